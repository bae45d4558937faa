//! The subcommands beside `run`.

use anyhow::{Context as _, anyhow};
use clustermesh_api::v1::agent_client::AgentClient;
use clustermesh_api::v1::{AgentStatusRequest, AgentStatusResponse, FlowsRequest};
use clustermesh_client::local::connect;
use clustermesh_ebpf::Datapath;
use serde_json::{Value, json};

use crate::config::Config;
use crate::encryption;
use crate::encryption::keys::{KEY_FILE, NEXT_KEY_FILE};
use crate::state_files::StateFiles;
use crate::{host, netlink, privileges, state_files};

/// How the status is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Text,
    /// One JSON object; fields are named as in `local.proto`.
    Json,
}

/// Prints the agent's status.
///
/// # Errors
/// No agent runs, or it cannot read its maps.
pub async fn status(config: &Config, output: Output) -> anyhow::Result<()> {
    let channel = connect(&config.socket()).await.map_err(|e| anyhow!(e))?;
    let status = AgentClient::new(channel)
        .status(AgentStatusRequest {})
        .await?
        .into_inner();
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&status_json(&status))?),
        Output::Text => print!("{}", status_text(&status)),
    }
    Ok(())
}

fn status_text(status: &AgentStatusResponse) -> String {
    use std::fmt::Write as _;

    let mut text = String::new();
    let connected = if status.server_connected {
        "connected"
    } else {
        "not connected, the kernel keeps what it has"
    };
    let mut line = |name: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:<18}{value}");
    };
    line(
        "Node:",
        format!("{} (cluster {})", status.node, status.cluster),
    );
    line("Server:", connected.to_owned());
    line("Pod CIDRs:", status.pod_cidrs.join(", "));
    line("Underlay:", status.underlay_addresses.join(", "));
    line(
        "Data path:",
        format!(
            "{}, {}, map layout {}",
            status.routing_mode, status.attach_mode, status.map_layout_version
        ),
    );
    for source in &status.applied {
        line(
            "Applied:",
            format!("revision {} of {}", source.revision, source.cluster),
        );
    }
    for endpoint in &status.endpoints {
        let ports: Vec<String> = endpoint
            .ports
            .iter()
            .map(|p| {
                let state = if p.ready { "ready" } else { "not ready" };
                format!("{}/{} {state}", p.port, p.protocol)
            })
            .collect();
        line(
            "Endpoint:",
            format!(
                "{}/{} {} identity {}{} {}",
                endpoint.namespace,
                endpoint.name,
                endpoint.addresses.join(" "),
                endpoint.identity,
                if endpoint.registered {
                    ""
                } else {
                    " (not registered yet)"
                },
                ports.join(", ")
            ),
        );
    }
    for path in status.paths.iter().filter(|path| path.black_hole) {
        line(
            "Black hole:",
            format!(
                "{}/{} to {}/{}: packets over {} bytes vanish, the devices take {}",
                status.cluster,
                status.node,
                path.cluster,
                path.node,
                path.mtu_bytes,
                path.device_mtu_bytes
            ),
        );
    }
    for (reason, count) in status.drops.iter().filter(|(_, count)| **count > 0) {
        line("Dropped:", format!("{count} packets: {reason}"));
    }
    for (reason, count) in &status.refused_records {
        line("Refused records:", format!("{count}: {reason}"));
    }
    text
}

fn status_json(status: &AgentStatusResponse) -> Value {
    let applied: Vec<Value> = status
        .applied
        .iter()
        .map(|s| json!({"cluster": s.cluster, "store_id": format!("{:x}", s.store_id), "revision": s.revision}))
        .collect();
    let endpoints: Vec<Value> = status
        .endpoints
        .iter()
        .map(|e| {
            let ports: Vec<Value> = e
                .ports
                .iter()
                .map(|p| json!({"port": p.port, "protocol": p.protocol, "ready": p.ready}))
                .collect();
            json!({
                "namespace": e.namespace, "name": e.name, "addresses": e.addresses,
                "identity": e.identity, "interface": e.interface, "container_id": e.container_id,
                "ports": ports, "registered": e.registered,
            })
        })
        .collect();
    let traffic: serde_json::Map<String, Value> = status
        .traffic
        .iter()
        .map(|(path, t)| {
            (
                path.clone(),
                json!({"packets": t.packets, "bytes": t.bytes}),
            )
        })
        .collect();
    let paths: Vec<Value> = status
        .paths
        .iter()
        .map(|path| {
            json!({
                "cluster": path.cluster, "node": path.node, "address": path.address, "mtu_bytes": path.mtu_bytes,
                "device_mtu_bytes": path.device_mtu_bytes, "black_hole": path.black_hole, "answers": path.answers,
            })
        })
        .collect();
    json!({
        "node": status.node,
        "cluster": status.cluster,
        "server_connected": status.server_connected,
        "applied": applied,
        "attach_mode": status.attach_mode,
        "routing_mode": status.routing_mode,
        "map_layout_version": status.map_layout_version,
        "endpoints": endpoints,
        "drops": status.drops,
        "traffic": traffic,
        "map_entries": status.map_entries,
        "refused_records": status.refused_records,
        "pod_cidrs": status.pod_cidrs,
        "underlay_addresses": status.underlay_addresses,
        "paths": paths,
    })
}

/// Prints flow records as lines of JSON until the agent ends or the reader of the output does.
///
/// # Errors
/// No agent runs, or the stream broke.
pub async fn flows(config: &Config) -> anyhow::Result<()> {
    use std::io::Write as _;

    let channel = connect(&config.socket()).await.map_err(|e| anyhow!(e))?;
    let mut stream = AgentClient::new(channel)
        .flows(FlowsRequest {})
        .await?
        .into_inner();
    let mut out = std::io::stdout();
    while let Some(flow) = stream.message().await? {
        let line = json!({
            "time_ns": flow.time_ns, "hook": flow.hook, "source": flow.source, "destination": flow.destination,
            "source_port": flow.source_port, "destination_port": flow.destination_port, "protocol": flow.protocol,
            "source_identity": flow.source_identity, "verdict": flow.verdict, "length": flow.length, "lost": flow.lost,
        });
        match writeln!(out, "{line}").and_then(|()| out.flush()) {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            other => other?,
        }
    }
    Ok(())
}

/// Detaches the programs, removes all pins and the host's pair. Pods keep their interfaces, without a way out.
///
/// # Errors
/// An agent runs, or the kernel refused something.
pub async fn uninstall(config: &Config) -> anyhow::Result<()> {
    privileges::require()?;
    let _lock = StateFiles::open(&config.state_dir)?;
    Datapath::uninstall(&config.datapath())?;
    let handle = netlink::connect()?;
    host::remove(&handle).await?;
    encryption::remove_devices(&handle).await?;
    println!("kernel programs, maps and {} removed", host::HOST_DEVICE);
    Ok(())
}

/// [`uninstall`], and removes the pods' interfaces and the state folder's contents.
///
/// # Errors
/// An agent runs, or the kernel or the file system refused something.
pub async fn cleanup(config: &Config) -> anyhow::Result<()> {
    uninstall(config).await?;
    let files = StateFiles::open(&config.state_dir)?;
    let handle = netlink::connect()?;
    for endpoint in files.endpoints()?.endpoints {
        netlink::delete_link(&handle, &endpoint.host_interface).await?;
    }
    for name in state_files::FILES
        .into_iter()
        .chain([KEY_FILE, NEXT_KEY_FILE])
    {
        remove_file(&config.state_dir.join(name))?;
    }
    remove_file(&config.socket())?;
    match std::fs::remove_dir_all(config.queue_dir()) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", config.queue_dir().display()))
        }
        _ => Ok(()),
    }
}

fn remove_file(path: &std::path::Path) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
