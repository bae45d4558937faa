//! Traffic of the lab, started inside namespaces; see `clustermesh_integration::traffic`.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};
use clustermesh_integration::traffic::{forge, forward, probe, serve, spin, stream, udp};
use serde::Serialize;

#[derive(Parser)]
#[command(about = "Traffic of the lab: each tool prints one line of JSON at its end")]
struct Arguments {
    #[command(subcommand)]
    tool: Tool,
}

#[derive(Subcommand)]
enum Tool {
    /// Say a name and echo, until SIGTERM; SIGUSR1 closes the TCP listeners
    Serve {
        #[arg(long)]
        name: String,
        #[arg(long)]
        tcp: Vec<u16>,
        #[arg(long)]
        udp: Vec<u16>,
    },
    /// New connections, one after another
    Probe {
        #[arg(long)]
        to: SocketAddr,
        /// End after so many attempts (default: at SIGTERM)
        #[arg(long, conflicts_with = "until_success")]
        attempts: Option<u64>,
        /// End at the first success
        #[arg(long)]
        until_success: bool,
        #[arg(long, default_value_t = 10)]
        every_ms: u64,
        #[arg(long, default_value_t = 1000)]
        timeout_ms: u64,
    },
    /// One long-lived connection
    Stream {
        #[arg(long)]
        to: SocketAddr,
        #[arg(long, default_value_t = 5)]
        every_ms: u64,
        /// Bytes of each message and its echo
        #[arg(long, default_value_t = 64)]
        bytes: usize,
    },
    /// Numbered datagrams
    Udp {
        #[arg(long)]
        to: SocketAddr,
        #[arg(long, default_value_t = 2)]
        every_ms: u64,
    },
    /// Accept and close on one CPU without ever sleeping, until SIGTERM
    SpinServe {
        #[arg(long)]
        listen: SocketAddr,
        #[arg(long)]
        cpu: usize,
    },
    /// Connect and close on one CPU as fast as it goes
    SpinConnect {
        /// Addresses, taken in turn
        #[arg(long, required = true)]
        to: Vec<SocketAddr>,
        #[arg(long)]
        cpu: usize,
        #[arg(long)]
        millis: u64,
    },
    /// A tunnel without encryption, until it is killed
    Forward {
        #[arg(long)]
        device: String,
        #[arg(long)]
        from: SocketAddr,
        #[arg(long)]
        to: SocketAddr,
    },
    /// Tunnel packets that lie
    Forge {
        #[arg(long)]
        from: Ipv4Addr,
        #[arg(long)]
        device: String,
        #[arg(long)]
        to: SocketAddr,
        #[arg(long)]
        identity: u32,
        #[arg(long)]
        inner_source: Ipv4Addr,
        #[arg(long)]
        inner_destination: Ipv4Addr,
        #[arg(long, default_value_t = 10)]
        count: u32,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    match Arguments::parse().tool {
        Tool::Serve { name, tcp, udp } => serve::serve(name, tcp, udp).await,
        Tool::Probe {
            to,
            attempts,
            until_success,
            every_ms,
            timeout_ms,
        } => {
            let until = match attempts {
                Some(attempts) => probe::Until::Attempts(attempts),
                None if until_success => probe::Until::FirstSuccess,
                None => probe::Until::Signal,
            };
            let (every, timeout) = (
                Duration::from_millis(every_ms),
                Duration::from_millis(timeout_ms),
            );
            report(&probe::probe(to, until, every, timeout).await?)
        }
        Tool::Stream {
            to,
            every_ms,
            bytes,
        } => report(&stream::stream(to, Duration::from_millis(every_ms), bytes).await?),
        Tool::Udp { to, every_ms } => report(&udp::udp(to, Duration::from_millis(every_ms)).await?),
        Tool::SpinServe { listen, cpu } => spin::serve(listen, cpu),
        Tool::SpinConnect { to, cpu, millis } => {
            report(&spin::connect_for(&to, cpu, Duration::from_millis(millis))?)
        }
        Tool::Forward { device, from, to } => forward::forward(&device, from, to),
        Tool::Forge {
            from,
            device,
            to,
            identity,
            inner_source,
            inner_destination,
            count,
        } => {
            forge::forge(
                from,
                &device,
                to,
                identity,
                inner_source,
                inner_destination,
                count,
            )
            .await
        }
    }
}

fn report(counts: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(counts)?);
    Ok(())
}
