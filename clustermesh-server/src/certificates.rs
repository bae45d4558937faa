//! The certificates that the configuration names, looked at before anything starts.

use clustermesh_process::{Organisation, PeerIdentity, ServerTls, TlsPaths};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use crate::config::Config;

/// Reads all of them, and sees that this server's own says that it is one.
///
/// # Errors
/// The key at fault, and why.
pub fn check(config: &Config) -> Result<(), String> {
    // Both roles are made of the same files, so one check finds what is wrong with them.
    let load = |key: &str, paths: TlsPaths| {
        let loaded = ServerTls::load(paths);
        loaded.map(drop).map_err(|error| format!("{key}: {error}"))
    };
    load("tls", config.server_tls_paths())?;
    for peer in &config.peers {
        load(
            &format!("peers ({})", peer.name),
            config.peer_tls_paths(peer),
        )?;
    }
    let replica_tls = config
        .replica
        .as_ref()
        .map(|section| section.tls_paths(&config.tls));
    if let Some(paths) = replica_tls.clone() {
        load("replica.tls", paths)?;
    }
    // Whoever talks to a cluster's server looks for its role; a plain store alone may have any certificate.
    let cluster = config.cluster.as_ref().map(|cluster| cluster.name.as_str());
    if cluster.is_some() {
        check_role("tls.cert", &config.server_tls_paths(), cluster)?;
    }
    if let Some(paths) = replica_tls {
        check_role("replica.tls.cert", &paths, cluster)?;
    }
    Ok(())
}

fn check_role(key: &str, paths: &TlsPaths, cluster: Option<&str>) -> Result<(), String> {
    let shown = paths.cert.display();
    let needed = || {
        let cluster = cluster.map_or_else(String::new, |name| format!(" of cluster {name}"));
        format!(
            "give one of {}{cluster}, as `clustermesh dev-ca issue server` makes",
            Organisation::Server.as_str()
        )
    };
    let held = CertificateDer::from_pem_file(&paths.cert)
        .map_err(|error| error.to_string())
        .and_then(|leaf| PeerIdentity::from_certificate(&leaf).map_err(|error| error.to_string()))
        .map_err(|reason| format!("{key} {shown}: {reason}; {}", needed()))?;
    let is_ours = cluster.is_none_or(|name| name == held.cluster);
    if held.organisation == Organisation::Server && is_ours {
        return Ok(());
    }
    Err(format!(
        "{key} {shown} is that of {} {} of cluster {}; {}",
        held.organisation.as_str(),
        held.common_name,
        held.cluster,
        needed()
    ))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

    use super::*;

    fn said(folder: &Path, organisation: &str, cluster: &str, rest: &str) -> Result<(), String> {
        clustermesh_process::install_crypto_provider();
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name = DistinguishedName::new();
        for (kind, value) in [
            (DnType::OrganizationName, organisation),
            (DnType::OrganizationalUnitName, cluster),
            (DnType::CommonName, "s1"),
        ] {
            params.distinguished_name.push(kind, value);
        }
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().pem();
        for (name, text) in [
            ("ca.crt", &certificate),
            ("s1.crt", &certificate),
            ("s1.key", &key.serialize_pem()),
        ] {
            std::fs::write(folder.join(name), text).unwrap();
        }
        let text = format!("[tls]\nca = \"ca.crt\"\ncert = \"s1.crt\"\nkey = \"s1.key\"\n{rest}");
        check(&Config::parse(&text, &folder.join("server.toml")).unwrap())
    }

    #[test]
    fn a_clusters_server_shows_a_servers_certificate_of_its_cluster() {
        const CLUSTER: &str = "[cluster]\nname = \"c1\"\nid = 1\n";
        const REPLICA: &str =
            "[replica]\nname = \"r1\"\ninitial_cluster = [\"r1=https://s1:2380\"]\n";
        let folder = tempfile::tempdir().unwrap();
        let said = |organisation, cluster, rest| said(folder.path(), organisation, cluster, rest);
        said("clustermesh:server", "c1", CLUSTER).unwrap();
        for (organisation, cluster, rest, told) in [
            ("clustermesh:node", "c1", CLUSTER, "tls.cert"),
            ("clustermesh:server", "c2", CLUSTER, "of cluster c2"),
            ("somebody", "c1", CLUSTER, "somebody"),
            ("clustermesh:operator", "c1", REPLICA, "replica.tls.cert"),
        ] {
            let reason = said(organisation, cluster, rest).unwrap_err();
            assert!(
                reason.contains(told) && reason.contains("dev-ca issue server"),
                "{reason}"
            );
        }
        // etcd's certificates say nothing of roles.
        said("somebody", "x", "").unwrap();
    }

    #[test]
    fn a_file_that_is_not_there_is_named_with_its_section() {
        let folder = tempfile::tempdir().unwrap();
        said(folder.path(), "clustermesh:server", "c1", "").unwrap();
        std::fs::remove_file(folder.path().join("s1.key")).unwrap();
        let text = "[tls]\nca = \"ca.crt\"\ncert = \"s1.crt\"\nkey = \"s1.key\"\n";
        let config = Config::parse(text, &folder.path().join("server.toml")).unwrap();
        let reason = check(&config).unwrap_err();
        assert!(
            reason.starts_with("tls: key file") && reason.contains("s1.key"),
            "{reason}"
        );
    }
}
