//! `dev-ca`: a certificate authority for tests and development, in plain files.

mod files;

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, ensure};
use clustermesh_api::names::{check_cluster_name, check_dns_subdomain};
use clustermesh_process::Organisation;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};
use serde_json::json;

use crate::{
    args::{DevCaArgs, DevCaCommand, IssueArgs, Output, Role},
    output,
};
use files::{Existing, Wanted};

const CA_NAME: &str = "ca";
const CA_DAYS: u16 = 3650;
const DAY: Duration = Duration::from_secs(86_400);
/// Machines whose clocks are a little behind take a new certificate too.
const BACKDATE: Duration = Duration::from_secs(3600);

pub fn run(args: &DevCaArgs, form: Output) -> Result<()> {
    let (certificate, changed) = match &args.command {
        DevCaCommand::Init { dir, force } => (dir.join("ca.crt"), init(dir, *force)?),
        DevCaCommand::Issue(args) => {
            let out = args.out.as_ref().unwrap_or(&args.dir);
            (out.join(format!("{}.crt", args.name)), issue(args)?)
        }
    };
    let action = if changed { "written" } else { "unchanged" };
    match form {
        Output::Table => output::print(&format!("{} {action}\n", certificate.display())),
        Output::Json => output::json(&json!({
            "certificate": certificate.display().to_string(),
            "key": certificate.with_extension("key").display().to_string(),
            "action": action,
        })),
    }
}

/// Makes the authority; false when there is one.
fn init(dir: &Path, force: bool) -> Result<bool> {
    if !force && files::exist(dir, CA_NAME)? {
        // Both must be usable, or every later command fails with a stranger message.
        load_ca(dir)?;
        return Ok(false);
    }
    let mut params = params(CA_DAYS)?;
    params
        .distinguished_name
        .push(DnType::CommonName, "clustermesh development CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().context("cannot make a key")?;
    let certificate = params
        .self_signed(&key)
        .context("cannot sign the CA's certificate")?;
    files::write(dir, CA_NAME, &certificate.pem(), &key.serialize_pem())?;
    Ok(true)
}

/// Issues a certificate; false when there is an equal one.
fn issue(args: &IssueArgs) -> Result<bool> {
    check_cluster_name(&args.cluster).context("--cluster")?;
    check_dns_subdomain(&args.name)?;
    ensure!(
        args.name != CA_NAME,
        "{CA_NAME:?} is the authority's own name"
    );
    ensure!(
        args.role != Role::Server || !args.sans.is_empty(),
        "a server needs --san with the host names and addresses that clients use"
    );
    let (issuer, ca_pem) = load_ca(&args.dir)?;
    let out = args.out.as_deref().unwrap_or(&args.dir);
    let (organisation, common_name) = subject(args);
    let wanted = Wanted {
        organisation: organisation.as_str(),
        cluster: &args.cluster,
        common_name: &common_name,
        sans: &args.sans,
    };
    if !args.force && files::exist(out, &args.name)? {
        return match files::compare(out, &args.name, &wanted, &ca_pem)? {
            Existing::Same => Ok(false),
            Existing::Different(difference) => Err(anyhow::anyhow!(
                "{}: {difference}; --force replaces it",
                out.join(format!("{}.crt", args.name)).display()
            )),
        };
    }
    let mut params = params(args.days)?;
    params.subject_alt_names = CertificateParams::new(args.sans.clone())
        .with_context(|| format!("--san {}", args.sans.join(" ")))?
        .subject_alt_names;
    let name = &mut params.distinguished_name;
    name.push(DnType::OrganizationName, organisation.as_str());
    name.push(DnType::OrganizationalUnitName, args.cluster.as_str());
    name.push(DnType::CommonName, common_name);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // Servers are clients of each other.
    params.extended_key_usages = match args.role {
        Role::Server => vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ],
        Role::Node | Role::Peer | Role::Operator => vec![ExtendedKeyUsagePurpose::ClientAuth],
    };
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate().context("cannot make a key")?;
    let certificate = params
        .signed_by(&key, &issuer)
        .context("cannot sign the certificate")?;
    files::write(out, &args.name, &certificate.pem(), &key.serialize_pem())?;
    Ok(true)
}

/// O and CN by role, as the server reads them.
fn subject(args: &IssueArgs) -> (Organisation, String) {
    match args.role {
        Role::Server => (Organisation::Server, args.name.clone()),
        Role::Node => (Organisation::Node, args.name.clone()),
        Role::Operator => (Organisation::Operator, format!("admin-{}", args.cluster)),
        Role::Peer if args.name == "remote" || args.name.starts_with("remote-") => {
            (Organisation::Peer, args.name.clone())
        }
        Role::Peer => (Organisation::Peer, format!("remote-{}", args.name)),
    }
}

fn params(days: u16) -> Result<CertificateParams> {
    let now = SystemTime::now();
    let until = now
        .checked_add(DAY * u32::from(days))
        .context("the clock is beyond reason")?;
    let from = now
        .checked_sub(BACKDATE)
        .context("the clock is beyond reason")?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.not_before = from.into();
    params.not_after = until.into();
    Ok(params)
}

fn load_ca(dir: &Path) -> Result<(Issuer<'static, KeyPair>, String)> {
    let hint = || {
        format!(
            "no usable authority in {}; `clustermesh dev-ca init --dir {}` makes one",
            dir.display(),
            dir.display()
        )
    };
    let (certificate, key) = files::read(dir, CA_NAME).with_context(hint)?;
    let key = KeyPair::from_pem(&key).with_context(hint)?;
    let issuer = Issuer::from_ca_cert_pem(&certificate, key).with_context(hint)?;
    Ok((issuer, certificate))
}

#[cfg(test)]
mod tests;
