//! The units for systemd in `deploy/systemd`: what they must say, and what `systemd-analyze verify` says of them.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/systemd")
}

fn unit(name: &str) -> String {
    std::fs::read_to_string(folder().join(name)).unwrap()
}

fn has(unit: &str, line: &str) -> bool {
    unit.lines().any(|found| found == line)
}

#[test]
fn the_agents_unit_ends_only_the_agent_and_waits_until_it_is_ready() {
    let unit = unit("clustermesh-node.service");
    for line in [
        "Type=notify",
        "KillMode=process",
        "OOMPolicy=continue",
        "Restart=always",
        "RestartPreventExitStatus=64",
    ] {
        assert!(has(&unit, line), "{line}");
    }
    // A mount namespace of its own would hide pins and pods' namespaces from the machine.
    for setting in [
        "ProtectSystem=",
        "PrivateTmp=",
        "ProtectHome=",
        "PrivateMounts=",
        "PrivateDevices=",
    ] {
        assert!(
            !unit.lines().any(|line| line.starts_with(setting)),
            "{setting}"
        );
    }
}

#[test]
fn the_servers_unit_gives_it_its_folder_and_nothing_else() {
    let unit = unit("clustermesh-server.service");
    for line in [
        "Type=notify",
        "User=clustermesh-server",
        "StateDirectory=clustermesh/server",
        "CapabilityBoundingSet=",
        "RestartPreventExitStatus=64",
    ] {
        assert!(has(&unit, line), "{line}");
    }
    assert!(self::unit("clustermesh-server.sysusers").starts_with("u clustermesh-server "));
}

#[test]
fn systemd_understands_the_units() {
    if Command::new("systemd-analyze")
        .arg("--version")
        .output()
        .is_err()
    {
        // Past the harness, which hides what passing tests print.
        writeln!(std::io::stderr(), "NOT RUN: systemd-analyze is not here").unwrap();
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for name in ["clustermesh-node.service", "clustermesh-server.service"] {
        // The programs are not installed here.
        let text = unit(name).replace(
            "ExecStart=/usr/bin/clustermesh-",
            "ExecStart=/bin/true clustermesh-",
        );
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        let output = Command::new("systemd-analyze")
            .arg("verify")
            .arg(&path)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        let about_it: Vec<&str> = said.lines().filter(|line| line.contains(name)).collect();
        assert!(
            output.status.success() && about_it.is_empty(),
            "{name}: {said}"
        );
    }
}
