use super::*;

fn parse(words: &[&str]) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(std::iter::once(&"clustermesh").chain(words))
}

#[test]
fn the_definitions_are_consistent() {
    use clap::CommandFactory as _;
    Cli::command().debug_assert();
}

#[test]
fn every_command_shows_an_example() {
    use clap::CommandFactory as _;
    for command in Cli::command().get_subcommands() {
        let help = command.clone().render_long_help().to_string();
        assert!(help.contains("Examples:"), "{}", command.get_name());
    }
}

#[test]
fn flags_are_taken_before_and_after_the_command() {
    let cli = parse(&[
        "--endpoint",
        "https://a:1,https://b:2",
        "status",
        "-o",
        "json",
    ])
    .unwrap();
    assert_eq!(cli.global.endpoint, ["https://a:1", "https://b:2"]);
    assert_eq!(cli.global.output, Output::Json);
}

#[test]
fn addresses_of_replicas_and_names_in_certificates_are_checked_before_anything_is_asked() {
    for (url, is_good) in [
        ("https://s4:2380", true),
        ("https://[::1]:2380", true),
        ("s4:2380", false),
        ("https://s4", false),
        ("https://s4:2380/x", false),
    ] {
        assert_eq!(parse(&["member", "add", url]).is_ok(), is_good, "{url}");
        let replaced = parse(&["member", "replace", "s2", url]);
        assert_eq!(replaced.is_ok(), is_good, "{url}");
    }
    for (san, is_good) in [
        ("127.0.0.1", true),
        ("fd00::1", true),
        ("c1.mesh.example", true),
        ("*.mesh.example", true),
        ("bad host", false),
        ("https://c1", false),
        ("", false),
    ] {
        let issued = parse(&[
            "dev-ca",
            "issue",
            "server",
            "s1",
            "--cluster",
            "c1",
            "--san",
            san,
        ]);
        assert_eq!(issued.is_ok(), is_good, "{san}");
    }
}

#[test]
fn durations_have_units() {
    for (text, expected_ms) in [
        ("60s", 60_000),
        ("250ms", 250),
        ("2m", 120_000),
        ("7", 7000),
    ] {
        let Command::Status(args) = parse(&["status", "--wait", "--timeout", text])
            .unwrap()
            .command
        else {
            panic!("not status")
        };
        assert_eq!(args.timeout, Duration::from_millis(expected_ms));
    }
    for bad in ["", "s", "0s", "-1s", "1h", "99999999999999999999s", "61m"] {
        assert!(
            parse(&["status", "--wait", "--timeout", bad]).is_err(),
            "{bad}"
        );
    }
}

#[test]
fn wrong_usage_is_refused() {
    for words in [
        &["get"][..],
        &["get", "pods"],
        &["delete"],
        &["delete", "service"],
        &["delete", "-f", "x", "service", "a"],
        &["apply"],
        &["dev-ca", "issue", "node", "w1"],
        &["status", "--timeout", "3s"],
        &[
            "dev-ca",
            "issue",
            "node",
            "w1",
            "--cluster",
            "c1",
            "--days",
            "0",
        ],
    ] {
        assert_eq!(parse(words).unwrap_err().exit_code(), 2, "{words:?}");
    }
}

#[test]
fn kinds_have_singular_names_too() {
    for (word, kind) in [
        ("node", GetKind::Nodes),
        ("services", GetKind::Services),
        ("identity", GetKind::Identities),
    ] {
        let Command::Get(args) = parse(&["get", word]).unwrap().command else {
            panic!("not get")
        };
        assert_eq!(args.kind, kind);
    }
    parse(&["delete", "-f", "-"]).unwrap();
}
