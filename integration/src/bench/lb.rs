//! Connections through the socket programs against straight ones and against kube-proxy's rules.
//!
//! One CPU connects and closes, the other accepts and spins; every contender has the same five
//! backends, and takes turns with the others in every round.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clustermesh_ebpf::Maps;
use nix::sys::signal::Signal;
use serde::Deserialize;
use tokio::process::Command;

use super::compare::{Figure, Named, Series, Target, against};
use super::kube_proxy;
use super::services::{BACKEND_PORT, PORT, SERVICES, Services, VIRTUAL_CIDR, client};
use super::site::{Site, at};
use super::{Wanted, real_time};
use crate::lab::host::{command_in, run};
use crate::lab::process::Process;

/// Rows of this suite.
pub const IDS: [&str; 5] = ["lb-rate", "lb-p99", "lb-flat", "lb-iptables", "lb-nft"];

/// Length of one measurement.
const MEASURE_MILLIS: &str = "500";
/// CPU of the client.
const CLIENT_CPU: &str = "0";
/// CPU of the server.
const SERVER_CPU: &str = "1";
/// Longest that a set of rules may take to load: nft needs half a minute for 60,000 chains.
const LOAD_SECONDS_MAX: u64 = 300;

/// One way to reach the backends.
struct Contender {
    name: &'static str,
    netns: String,
    cgroup: PathBuf,
    targets: Vec<String>,
}

/// What [`spin`](crate::traffic::spin) reports.
#[derive(Deserialize)]
struct Rate {
    per_second: f64,
    p99_us: f64,
}

/// One contender's rounds.
#[derive(Default)]
struct Rounds {
    rate: Series,
    p99: Series,
}

/// Measures the rows.
///
/// # Errors
/// When the contenders cannot be set up or a measurement fails.
pub async fn run_all(
    rounds: usize,
    wanted: &Wanted,
    progress: &dyn Fn(&str),
) -> Result<Vec<Figure>> {
    let cpus = std::thread::available_parallelism()?.get();
    if cpus < 2 {
        bail!("client and server need a CPU each; this machine has {cpus}");
    }
    let site = Site::new()?;
    let result = measure(&site, rounds, wanted, progress).await;
    let removed = site.remove().await;
    let figures = result?;
    removed?;
    Ok(figures)
}

async fn measure(
    site: &Site,
    rounds: usize,
    wanted: &Wanted,
    progress: &dyn Fn(&str),
) -> Result<Vec<Figure>> {
    let mut contenders = socket_contenders(site, progress).await?;
    let many = Services { count: SERVICES };
    if wanted.has("lb-iptables") {
        progress("lb: loading kube-proxy's iptables rules");
        let rules = kube_proxy::iptables(many);
        contenders.push(kernel_contender(site, "iptables", &rules).await?);
    }
    if wanted.has("lb-nft") {
        progress("lb: loading kube-proxy's nftables rules (half a minute)");
        let rules = kube_proxy::nftables(many);
        contenders.push(kernel_contender(site, "nftables", &rules).await?);
    }
    let mut taken: Vec<Rounds> = contenders.iter().map(|_| Rounds::default()).collect();
    for round in 0..rounds {
        // Another one begins in every round: none always follows the same one.
        for turn in 0..contenders.len() {
            let place = (round + turn) % contenders.len();
            let (contender, rounds_of) = (&contenders[place], &mut taken[place]);
            let name = contender.name;
            progress(&format!("lb: round {} of {rounds}, {name}", round + 1));
            let rate = connect_once(site, contender).await?;
            rounds_of.rate.push(rate.per_second);
            rounds_of.p99.push(rate.p99_us);
        }
    }
    figures(&contenders, &taken)
}

fn figures(contenders: &[Contender], taken: &[Rounds]) -> Result<Vec<Figure>> {
    let of = |name: &str| {
        contenders
            .iter()
            .position(|contender| contender.name == name)
            .map(|place| &taken[place])
    };
    let straight = of("straight").context("straight was measured")?;
    let ours = of("ours").context("ours was measured")?;
    let one = of("ours-one").context("one service was measured")?;
    let named = |id, row, unit| Named { id, row, unit };
    let mut figures = vec![
        against(
            named(
                "lb-rate",
                "connections by a virtual address, 10,000 services x 5 backends, reverse state on",
                "conn/s",
            ),
            &ours.rate,
            "connecting straight",
            &straight.rate,
            Target::RatioAtLeast(0.92),
        ),
        against(
            named("lb-p99", "99th percentile of the same", "us"),
            &ours.p99,
            "connecting straight",
            &straight.p99,
            Target::RatioAtMost(1.2),
        ),
        against(
            named("lb-flat", "rate with 10,000 services against one", "conn/s"),
            &ours.rate,
            "one service",
            &one.rate,
            Target::RatioAtLeast(0.95),
        ),
    ];
    for (id, limit, name, peer, least) in [
        (
            "lb-iptables",
            "lb-iptables-limit",
            "iptables",
            "kube-proxy's iptables rules",
            15.0,
        ),
        (
            "lb-nft",
            "lb-nft-limit",
            "nftables",
            "kube-proxy's nftables rules",
            1.3,
        ),
    ] {
        if let Some(theirs) = of(name) {
            let row = named(
                id,
                "rate against kube-proxy's rules at 10,000 services",
                "conn/s",
            );
            let target = Target::RatioAtLeast(least);
            figures.push(against(row, &ours.rate, peer, &theirs.rate, target));
            // No load-balancer of any kind can be further ahead than no load-balancer at all.
            let row = named(
                limit,
                "connecting straight against the same: the most that any could reach here",
                "conn/s",
            );
            let target = Target::Report;
            figures.push(against(row, &straight.rate, peer, &theirs.rate, target));
        }
    }
    Ok(figures)
}

/// A namespace in which the measured backends are local and virtual addresses lead to the loopback device.
async fn namespace(site: &Site, name: &str) -> Result<String> {
    let services = Services { count: SERVICES };
    let mut addresses = vec![client()];
    addresses.extend(services.backends(services.measured()));
    site.netns(name, &addresses, VIRTUAL_CIDR).await
}

/// Without programs, with ours and 10,000 services, with ours and one: three cgroups in one namespace.
async fn socket_contenders(site: &Site, progress: &dyn Fn(&str)) -> Result<Vec<Contender>> {
    progress("lb: loading the programs");
    let netns = namespace(site, "socket").await?;
    let many = Services { count: SERVICES };
    let backends = many.backends(many.measured());
    let mut contenders = vec![Contender {
        name: "straight",
        netns: netns.clone(),
        cgroup: site.cgroup("straight")?,
        targets: backends.map(|backend| at(backend, BACKEND_PORT)).collect(),
    }];
    for (name, device, count) in [("ours", "many", SERVICES), ("ours-one", "one", 1)] {
        let services = Services { count };
        let cgroup = site.cgroup(name)?;
        let bpffs = site.datapath(device, &netns, &cgroup).await?;
        services.entries().write(&Maps::open_pinned(&bpffs)?)?;
        contenders.push(Contender {
            name,
            netns: netns.clone(),
            cgroup,
            targets: vec![at(services.address(services.measured()), PORT)],
        });
    }
    Ok(contenders)
}

/// A namespace with rules of the kernel's packet filter.
async fn kernel_contender(site: &Site, name: &'static str, rules: &str) -> Result<Contender> {
    let netns = namespace(site, name).await?;
    let file = site.folder().join(name);
    std::fs::write(&file, rules)?;
    let mut command = if name == "iptables" {
        // The legacy back end: nft's translation of these rules has another shape.
        let mut command = command_in(&netns, None, Path::new("iptables-legacy-restore"));
        command.args(["-w", "60"]).arg(&file);
        command
    } else {
        let mut command = command_in(&netns, None, Path::new("nft"));
        command.arg("-f").arg(&file);
        command
    };
    load(&mut command).await?;
    // Closed connections must not fill the table of all namespaces between two rounds.
    site.sysctl(&netns, "net.netfilter.nf_conntrack_tcp_timeout_close=1")
        .await?;
    let services = Services { count: SERVICES };
    Ok(Contender {
        name,
        netns,
        cgroup: site.cgroup(name)?,
        targets: vec![at(services.address(services.measured()), PORT)],
    })
}

async fn load(command: &mut Command) -> Result<()> {
    let shown = format!("{:?}", command.as_std());
    let output = command.stdin(Stdio::null()).output();
    let output = tokio::time::timeout(Duration::from_secs(LOAD_SECONDS_MAX), output)
        .await
        .with_context(|| format!("{shown} took longer than {LOAD_SECONDS_MAX} s"))??;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        bail!("{shown} failed ({}): {error}", output.status);
    }
    Ok(())
}

async fn connect_once(site: &Site, contender: &Contender) -> Result<Rate> {
    let traffic = crate::lab::binaries_folder()?.join("clustermesh-lab-traffic");
    let log = site.folder().join("server.log");
    let listen = at(std::net::Ipv4Addr::UNSPECIFIED, BACKEND_PORT);
    let mut serve = real_time(&contender.netns, None, &traffic);
    serve.args(["spin-serve", "--listen", &listen, "--cpu", SERVER_CPU]);
    let server = Process::start_ready("the spinning server", &mut serve, &log).await?;
    let cgroup = Some(contender.cgroup.as_path());
    let mut connect = real_time(&contender.netns, cgroup, &traffic);
    connect.args(["spin-connect", "--cpu", CLIENT_CPU]);
    connect.args(["--millis", MEASURE_MILLIS]);
    for target in &contender.targets {
        connect.args(["--to", target]);
    }
    let output = run(&mut connect).await;
    server.stop(Signal::SIGTERM).await?;
    let output = output.with_context(|| format!("measuring {}", contender.name))?;
    serde_json::from_slice(&output.stdout).context("report of the client")
}
