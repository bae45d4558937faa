use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf};

use clustermesh_process::{ClientTls, PeerIdentity, ServerTls, TlsPaths};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject as _};

use super::*;

fn arguments(dir: &Path, role: Role, name: &str, sans: &[&str]) -> IssueArgs {
    IssueArgs {
        role,
        name: name.to_owned(),
        cluster: "c1".to_owned(),
        sans: sans.iter().map(|san| (*san).to_owned()).collect(),
        dir: dir.to_owned(),
        out: None,
        days: 365,
        force: false,
    }
}

fn paths(dir: &Path, name: &str) -> TlsPaths {
    let file = |ending: &str| -> PathBuf { dir.join(format!("{name}.{ending}")) };
    TlsPaths {
        ca: dir.join("ca.crt"),
        cert: file("crt"),
        key: file("key"),
    }
}

fn identity(dir: &Path, name: &str) -> PeerIdentity {
    let der = CertificateDer::from_pem_file(dir.join(format!("{name}.crt"))).unwrap();
    PeerIdentity::from_certificate(&der).unwrap()
}

async fn handshake(dir: &Path, client: &str, server_name: &str) -> std::io::Result<PeerIdentity> {
    let server = ServerTls::load(paths(dir, "c1-server")).unwrap();
    let client = ClientTls::load(paths(dir, client)).unwrap();
    let (near, far) = tokio::io::duplex(65_536);
    let name = ServerName::try_from(server_name.to_owned()).unwrap();
    let connector = tokio_rustls::TlsConnector::from(client.config());
    let acceptor = tokio_rustls::TlsAcceptor::from(server.config());
    let (connected, accepted) = tokio::join!(connector.connect(name, near), acceptor.accept(far));
    connected?;
    let accepted = accepted?;
    let (_, session) = accepted.get_ref();
    Ok(PeerIdentity::from_certificate(&session.peer_certificates().unwrap()[0]).unwrap())
}

#[tokio::test]
async fn issued_certificates_open_a_connection_and_name_their_holder() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    assert!(init(dir, false).unwrap());
    assert!(
        issue(&arguments(
            dir,
            Role::Server,
            "c1-server",
            &["127.0.0.1", "fd00::1", "c1.mesh.example"]
        ))
        .unwrap()
    );
    for (role, name, common_name, organisation) in [
        (Role::Node, "w1", "w1", Organisation::Node),
        (Role::Peer, "c2", "remote-c2", Organisation::Peer),
        (Role::Peer, "remote", "remote", Organisation::Peer),
        (Role::Operator, "admin", "admin-c1", Organisation::Operator),
    ] {
        assert!(issue(&arguments(dir, role, name, &[])).unwrap());
        for server_name in ["127.0.0.1", "fd00::1", "c1.mesh.example"] {
            let holder = handshake(dir, name, server_name).await.unwrap();
            assert_eq!(
                (holder.organisation, holder.common_name.as_str()),
                (organisation, common_name)
            );
            assert_eq!(holder.cluster, "c1");
        }
    }
    assert!(handshake(dir, "w1", "other.example").await.is_err());
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_refused() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for dir in [ours.path(), theirs.path()] {
        init(dir, false).unwrap();
        issue(&arguments(dir, Role::Server, "c1-server", &["localhost"])).unwrap();
        issue(&arguments(dir, Role::Node, "w1", &[])).unwrap();
    }
    for file in ["w1.crt", "w1.key"] {
        fs::copy(theirs.path().join(file), ours.path().join(file)).unwrap();
    }
    assert!(handshake(ours.path(), "w1", "localhost").await.is_err());
    let error = issue(&arguments(ours.path(), Role::Node, "w1", &[]))
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with("w1.crt: another authority issued it; --force replaces it"),
        "{error}"
    );
}

#[test]
fn keys_are_for_their_owner_only() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    init(dir, false).unwrap();
    issue(&arguments(dir, Role::Node, "w1", &[])).unwrap();
    for key in ["ca.key", "w1.key"] {
        assert_eq!(
            fs::metadata(dir.join(key)).unwrap().permissions().mode() & 0o777,
            0o600,
            "{key}"
        );
    }
    let files = fs::read_dir(dir).unwrap().count();
    assert_eq!(files, 4, "no temporary file is left");
}

#[test]
fn a_second_run_changes_nothing_and_force_replaces() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    init(dir, false).unwrap();
    let args = arguments(dir, Role::Server, "c1-server", &["127.0.0.1", "a.example"]);
    issue(&args).unwrap();
    let content = || {
        ["ca.crt", "ca.key", "c1-server.crt", "c1-server.key"]
            .map(|file| fs::read(dir.join(file)).unwrap())
    };
    let before = content();
    assert!(!init(dir, false).unwrap());
    assert!(!issue(&args).unwrap());
    assert_eq!(content(), before);
    assert!(
        issue(&IssueArgs {
            force: true,
            ..args
        })
        .unwrap()
    );
    assert_ne!(content()[2], before[2]);
    assert!(init(dir, true).unwrap());
    assert_ne!(content()[0], before[0]);
}

#[test]
fn a_certificate_that_says_something_else_is_not_taken_for_the_wanted_one() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    init(dir, false).unwrap();
    issue(&arguments(dir, Role::Node, "w1", &[])).unwrap();
    let refusal = |args: &IssueArgs| issue(args).unwrap_err().to_string();
    let other_cluster = IssueArgs {
        cluster: "c2".to_owned(),
        ..arguments(dir, Role::Node, "w1", &[])
    };
    assert!(refusal(&other_cluster).contains("its cluster is \"c1\", not \"c2\""));
    assert!(
        refusal(&arguments(dir, Role::Operator, "w1", &[]))
            .contains("its role is \"clustermesh:node\"")
    );
    assert!(
        refusal(&arguments(dir, Role::Node, "w1", &["a.example"])).contains("its names are []")
    );
    fs::remove_file(dir.join("w1.key")).unwrap();
    assert!(refusal(&arguments(dir, Role::Node, "w1", &[])).contains("is there without its key"));
    assert_eq!(identity(dir, "w1").cluster, "c1");
}

#[test]
fn what_cannot_be_issued_is_said_clearly() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let refusal = |args: &IssueArgs| format!("{:#}", issue(args).unwrap_err());
    let node = arguments(dir, Role::Node, "w1", &[]);
    assert!(
        refusal(&node).contains("no usable authority in"),
        "{}",
        refusal(&node)
    );
    init(dir, false).unwrap();
    assert!(refusal(&arguments(dir, Role::Server, "s", &[])).contains("a server needs --san"));
    assert!(refusal(&arguments(dir, Role::Node, "../w1", &[])).contains("name \"../w1\""));
    assert!(refusal(&arguments(dir, Role::Node, "ca", &[])).contains("the authority's own name"));
    let bad_cluster = IssueArgs {
        cluster: "C1".to_owned(),
        ..node
    };
    assert!(refusal(&bad_cluster).contains("cluster name \"C1\""));
}
