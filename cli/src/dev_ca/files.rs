//! Certificates and keys as files: written whole, keys for their owner only, and compared with what is wanted.

use std::{
    collections::BTreeSet,
    fs::{self, OpenOptions},
    io::Write as _,
    net::IpAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer as _};

const CERTIFICATE_MODE: u32 = 0o644;
const KEY_MODE: u32 = 0o600;

fn paths(dir: &Path, name: &str) -> (PathBuf, PathBuf) {
    (
        dir.join(format!("{name}.crt")),
        dir.join(format!("{name}.key")),
    )
}

/// Whether both files are there.
pub fn exist(dir: &Path, name: &str) -> Result<bool> {
    let (certificate, key) = paths(dir, name);
    match (certificate.exists(), key.exists()) {
        (false, false) => Ok(false),
        (true, true) => Ok(true),
        (true, false) => bail!(
            "{} is there without its key; --force replaces it",
            certificate.display()
        ),
        (false, true) => bail!(
            "{} is there without its certificate; --force replaces it",
            key.display()
        ),
    }
}

/// Certificate and key, as PEM.
pub fn read(dir: &Path, name: &str) -> Result<(String, String)> {
    let (certificate, key) = paths(dir, name);
    let read = |path: &Path| {
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
    };
    Ok((read(&certificate)?, read(&key)?))
}

/// Writes both files, the key first: a certificate without its key would look complete.
pub fn write(dir: &Path, name: &str, certificate_pem: &str, key_pem: &str) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let (certificate, key) = paths(dir, name);
    write_file(&key, key_pem, KEY_MODE)?;
    write_file(&certificate, certificate_pem, CERTIFICATE_MODE)
}

/// A reader sees the old file or the new one, and a key is at no moment readable for others.
fn write_file(path: &Path, text: &str, mode: u32) -> Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let write = || -> std::io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    let written = write();
    if written.is_err() {
        // Nothing to do about a leftover that cannot be removed either.
        let _ = fs::remove_file(&temporary);
    }
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// What a certificate should say.
#[derive(Debug)]
pub struct Wanted<'a> {
    pub organisation: &'a str,
    pub cluster: &'a str,
    pub common_name: &'a str,
    pub sans: &'a [String],
}

/// What is there.
#[derive(Debug, PartialEq, Eq)]
pub enum Existing {
    Same,
    Different(String),
}

/// Compares a certificate with what is wanted.
pub fn compare(dir: &Path, name: &str, wanted: &Wanted<'_>, ca_pem: &str) -> Result<Existing> {
    let (path, _) = paths(dir, name);
    let (certificate_pem, _) = read(dir, name)?;
    let unreadable = || format!("{} is no certificate; --force replaces it", path.display());
    let der =
        CertificateDer::from_pem_slice(certificate_pem.as_bytes()).with_context(unreadable)?;
    let (_, certificate) = X509Certificate::from_der(&der).with_context(unreadable)?;
    let ca_der =
        CertificateDer::from_pem_slice(ca_pem.as_bytes()).context("the CA's certificate")?;
    let (_, ca) = X509Certificate::from_der(&ca_der).context("the CA's certificate")?;

    let subject = certificate.subject();
    let only = |value: Option<&x509_parser::x509::AttributeTypeAndValue<'_>>| {
        value
            .and_then(|value| value.as_str().ok())
            .unwrap_or_default()
            .to_owned()
    };
    for (what, found, expected) in [
        (
            "role",
            only(subject.iter_organization().next()),
            wanted.organisation,
        ),
        (
            "cluster",
            only(subject.iter_organizational_unit().next()),
            wanted.cluster,
        ),
        (
            "name",
            only(subject.iter_common_name().next()),
            wanted.common_name,
        ),
    ] {
        if found != expected {
            return Ok(Existing::Different(format!(
                "its {what} is {found:?}, not {expected:?}"
            )));
        }
    }
    let found = sans(&certificate);
    if found != wanted.sans.iter().cloned().collect() {
        let list: Vec<&str> = found.iter().map(String::as_str).collect();
        return Ok(Existing::Different(format!(
            "its names are [{}], not those given",
            list.join(", ")
        )));
    }
    if !certificate.validity().is_valid() {
        return Ok(Existing::Different("it has expired".to_owned()));
    }
    // Every CA that `init` makes has the same name: only its key tells them apart.
    if key_id(&certificate, false) != key_id(&ca, true) {
        return Ok(Existing::Different(
            "another authority issued it".to_owned(),
        ));
    }
    Ok(Existing::Same)
}

fn sans(certificate: &X509Certificate<'_>) -> BTreeSet<String> {
    let Ok(Some(extension)) = certificate.subject_alternative_name() else {
        return BTreeSet::new();
    };
    let text = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => {
            match (<[u8; 4]>::try_from(*bytes), <[u8; 16]>::try_from(*bytes)) {
                (Ok(bytes), _) => Some(IpAddr::from(bytes).to_string()),
                (_, Ok(bytes)) => Some(IpAddr::from(bytes).to_string()),
                _ => None,
            }
        }
        _ => None,
    };
    extension
        .value
        .general_names
        .iter()
        .filter_map(text)
        .collect()
}

/// The identifier of the own key, or of the issuer's.
fn key_id(certificate: &X509Certificate<'_>, own: bool) -> Option<Vec<u8>> {
    use x509_parser::extensions::ParsedExtension;
    certificate
        .extensions()
        .iter()
        .find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) if own => Some(id.0.to_vec()),
            ParsedExtension::AuthorityKeyIdentifier(id) if !own => {
                id.key_identifier.as_ref().map(|id| id.0.to_vec())
            }
            _ => None,
        })
}
