//! The CNI plugin: thin. It reads environment and configuration, calls the agent, writes JSON.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clustermesh_api::v1::cni_client::CniClient;
use clustermesh_api::v1::{
    CniAddResponse, CniAttachment, CniCheckRequest, CniError as WireError, CniGcRequest,
    CniRequest, CniStatusRequest,
};
use clustermesh_node_core::cni::{
    AddResult, Call, CniError, Command, Config, Interface, IpConfig, Route, VersionResult, code,
    newest,
};
use clustermesh_node_core::ipam::Attachment;
use prost::Message as _;
use tonic::Status;

use crate::config::{DEFAULT_RUN_DIR, DEFAULT_STATE_DIR, QUEUE_NAME, SOCKET_NAME};
use crate::endpoints::queued_del_file;
use crate::state_files::write_durably;
use clustermesh_client::local::connect;

/// Longest call: an ADD waits 5 s for its workload.
const CALL_WAIT: Duration = Duration::from_secs(30);

/// Answers one call: what goes to standard output.
///
/// # Errors
/// What goes to standard output instead, with exit code 1.
pub async fn answer(
    get: impl Fn(&str) -> Option<String>,
    stdin: &[u8],
) -> Result<Option<String>, CniError> {
    let call = Call::from_environment(get)?;
    if call.command == Command::Version {
        let version =
            Config::from_json(stdin).map_or_else(|_| newest().to_owned(), |c| c.cni_version);
        return json(&VersionResult::new(&version)).map(Some);
    }
    let config = Config::from_json(stdin)?;
    let version = config.cni_version.clone();
    serve(&call, &config)
        .await
        .map_err(|error| error.for_version(&version))
}

async fn serve(call: &Call, config: &Config) -> Result<Option<String>, CniError> {
    let socket = config.socket.as_ref().map_or_else(
        || Path::new(DEFAULT_RUN_DIR).join(SOCKET_NAME),
        PathBuf::from,
    );
    let channel = match connect(&socket).await {
        Ok(channel) => channel,
        Err(details) => return without_agent(call, config, details),
    };
    let mut client = CniClient::new(channel);
    let request = CniRequest {
        container_id: call.container_id.clone(),
        netns: call.netns.clone(),
        ifname: call.ifname.clone(),
        namespace: call.namespace.clone(),
        name: call.name.clone(),
    };
    match call.command {
        Command::Add => {
            let response = timed(client.add(request)).await?;
            let result = add_result(call, response)?.for_version(&config.cni_version);
            json(&result).map(Some)
        }
        Command::Del => timed(client.del(request)).await.map(|_| None),
        Command::Check => {
            let addresses = config
                .prev_result
                .iter()
                .flat_map(|result| &result.ips)
                .map(|ip| ip.address.to_string())
                .collect();
            let request = CniCheckRequest {
                attachment: Some(request),
                addresses,
            };
            timed(client.check(request)).await.map(|_| None)
        }
        Command::Gc => {
            let Some(valid) = &config.valid_attachments else {
                return Err(CniError::new(
                    code::INVALID_CONFIG,
                    "GC without cni.dev/valid-attachments",
                    "without the list every container would be detached",
                ));
            };
            let valid_attachments = valid
                .iter()
                .map(|a| CniAttachment {
                    container_id: a.container_id.clone(),
                    ifname: a.ifname.clone(),
                })
                .collect();
            timed(client.gc(CniGcRequest { valid_attachments }))
                .await
                .map(|_| None)
        }
        Command::Status => timed(client.status(CniStatusRequest {}))
            .await
            .map(|_| None),
        Command::Version => Ok(None),
    }
}

async fn timed<T>(
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, CniError> {
    match tokio::time::timeout(CALL_WAIT, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(from_status(&status)),
        Err(_) => Err(CniError::new(
            code::TRY_AGAIN_LATER,
            "the agent does not answer",
            format!("waited {} s", CALL_WAIT.as_secs()),
        )),
    }
}

/// The agent's own error travels in the status; anything else is a broken connection.
fn from_status(status: &Status) -> CniError {
    match WireError::decode(status.details()) {
        Ok(error) if error.code != 0 => CniError::new(error.code, error.msg, error.details),
        _ => CniError::new(
            code::TRY_AGAIN_LATER,
            "the connection to the agent broke",
            status.message(),
        ),
    }
}

/// DEL is queued until an agent looks; everything else must wait for one.
fn without_agent(
    call: &Call,
    config: &Config,
    details: String,
) -> Result<Option<String>, CniError> {
    match call.command {
        Command::Del => {
            let dir = config.queue_dir.as_ref().map_or_else(
                || Path::new(DEFAULT_STATE_DIR).join(QUEUE_NAME),
                PathBuf::from,
            );
            queue(&dir, call).map(|()| None)
        }
        Command::Status => Err(CniError::new(
            code::NOT_AVAILABLE,
            "the agent is not running",
            details,
        )),
        _ => Err(CniError::new(
            code::TRY_AGAIN_LATER,
            "the agent is not running",
            details,
        )),
    }
}

fn queue(dir: &Path, call: &Call) -> Result<(), CniError> {
    let attachment = Attachment {
        container_id: call.container_id.clone(),
        ifname: call.ifname.clone(),
    };
    let path = queued_del_file(dir, &attachment);
    let stored = serde_json::to_vec(&attachment)
        .map_err(std::io::Error::from)
        .and_then(|bytes| {
            std::fs::create_dir_all(dir)?;
            write_durably(&path, &bytes)
        });
    stored.map_err(|error| {
        CniError::new(
            code::IO_FAILURE,
            "the agent is not running and DEL cannot be queued",
            format!("{}: {error}", path.display()),
        )
    })
}

fn add_result(call: &Call, response: CniAddResponse) -> Result<AddResult, CniError> {
    let bad = |what: &str| {
        CniError::new(
            code::DECODING_FAILURE,
            "the agent's answer cannot be used",
            format!("{what:?} is no address"),
        )
    };
    let gateway = |text: &str| -> Result<Option<IpAddr>, CniError> {
        if text.is_empty() {
            return Ok(None);
        }
        text.parse().map(Some).map_err(|_| bad(text))
    };
    let mut result = AddResult {
        interfaces: vec![
            Interface {
                name: response.host_interface,
                mac: response.host_mac,
                mtu: Some(response.mtu),
                sandbox: String::new(),
            },
            Interface {
                name: call.ifname.clone(),
                mac: response.container_mac,
                mtu: Some(response.mtu),
                sandbox: call.netns.clone(),
            },
        ],
        ..AddResult::default()
    };
    for address in &response.addresses {
        result.ips.push(IpConfig {
            address: address.address.parse().map_err(|_| bad(&address.address))?,
            gateway: gateway(&address.gateway)?,
            interface: Some(1),
            version: None,
        });
    }
    for route in &response.routes {
        result.routes.push(Route {
            dst: route
                .destination
                .parse()
                .map_err(|_| bad(&route.destination))?,
            gw: gateway(&route.gateway)?,
        });
    }
    Ok(result)
}

/// # Errors
/// None in practice: the types have textual keys only.
fn json<T: serde::Serialize>(value: &T) -> Result<String, CniError> {
    serde_json::to_string(value).map_err(|error| {
        CniError::new(
            code::IO_FAILURE,
            "the answer cannot be written",
            error.to_string(),
        )
    })
}

#[cfg(test)]
mod tests;
