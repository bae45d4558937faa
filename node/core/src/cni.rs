//! The CNI specification's JSON (version 1.1): configuration in, result and errors out.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

/// Versions of the specification that the plugin speaks, oldest first.
pub const VERSIONS: [&str; 3] = ["0.4.0", "1.0.0", "1.1.0"];
/// Longest container id, bytes.
pub const CONTAINER_ID_BYTES_MAX: usize = 256;
/// Longest interface name, bytes (IFNAMSIZ without the final zero).
pub const IFNAME_BYTES_MAX: usize = 15;
/// Largest configuration, bytes.
pub const CONFIG_BYTES_MAX: usize = 1 << 20;

/// Error codes: those below 100 are the specification's.
pub mod code {
    /// The configuration's `cniVersion` is not supported.
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    /// Unknown container: nothing needs to be cleaned up.
    pub const UNKNOWN_CONTAINER: u32 = 3;
    /// A CNI_* variable is missing or malformed.
    pub const INVALID_ENVIRONMENT: u32 = 4;
    /// A file, socket or device could not be read or written.
    pub const IO_FAILURE: u32 = 5;
    /// The configuration is not the JSON that it should be.
    pub const DECODING_FAILURE: u32 = 6;
    /// The configuration is valid JSON but cannot be used.
    pub const INVALID_CONFIG: u32 = 7;
    /// Not now: the runtime should try again.
    pub const TRY_AGAIN_LATER: u32 = 11;
    /// STATUS: the plugin cannot serve ADD.
    pub const NOT_AVAILABLE: u32 = 50;
    /// No address is left.
    pub const ADDRESSES_EXHAUSTED: u32 = 100;
    /// CHECK: the container is not as ADD left it.
    pub const CHECK_FAILED: u32 = 101;
    /// The kernel refused something.
    pub const KERNEL: u32 = 102;
}

/// An error in the specification's form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{msg}: {details} (code {code})")]
#[serde(rename_all = "camelCase")]
pub struct CniError {
    /// Version of the specification that the caller speaks.
    pub cni_version: String,
    /// See [`code`].
    pub code: u32,
    /// One sentence.
    pub msg: String,
    /// What exactly, and the remedy.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}

impl CniError {
    /// An error for a caller of the newest version; see [`CniError::for_version`].
    #[must_use]
    pub fn new(code: u32, msg: impl Into<String>, details: impl Into<String>) -> Self {
        Self {
            cni_version: newest().to_owned(),
            code,
            msg: msg.into(),
            details: details.into(),
        }
    }

    /// The same error in another version.
    #[must_use]
    pub fn for_version(mut self, version: &str) -> Self {
        version.clone_into(&mut self.cni_version);
        self
    }
}

/// The newest version that the plugin speaks.
#[must_use]
pub const fn newest() -> &'static str {
    VERSIONS[VERSIONS.len() - 1]
}

/// What the runtime asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Attach a container.
    Add,
    /// Detach a container.
    Del,
    /// Verify an attachment.
    Check,
    /// Remove attachments that are not listed.
    Gc,
    /// Say whether ADD can be served.
    Status,
    /// List versions.
    Version,
}

/// The network configuration on standard input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Config {
    /// Version of the specification.
    pub cni_version: String,
    /// Network name.
    #[serde(default)]
    pub name: String,
    /// Name of this plugin.
    #[serde(rename = "type", default)]
    pub plugin: String,
    /// Path of the agent's socket; absent = the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
    /// Folder for DELs that came while the agent was down; absent = the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_dir: Option<String>,
    /// Result of ADD, for CHECK and DEL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prev_result: Option<AddResult>,
    /// Attachments that GC must keep.
    #[serde(
        rename = "cni.dev/valid-attachments",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub valid_attachments: Option<Vec<ValidAttachment>>,
}

/// An attachment that GC must keep.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ValidAttachment {
    /// Container id.
    #[serde(rename = "containerID")]
    pub container_id: String,
    /// Interface name.
    pub ifname: String,
}

/// Result of ADD.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AddResult {
    /// Version of the specification.
    pub cni_version: String,
    /// Interfaces: host end, then container end.
    pub interfaces: Vec<Interface>,
    /// Addresses.
    pub ips: Vec<IpConfig>,
    /// Routes.
    pub routes: Vec<Route>,
    /// Name servers; none of ours.
    pub dns: BTreeMap<String, serde_json::Value>,
}

/// An interface in a result.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Interface {
    /// Name.
    pub name: String,
    /// Hardware address.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub mac: String,
    /// Largest packet, bytes (since 1.1.0).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Network namespace; absent for the host's.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
}

/// An address in a result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpConfig {
    /// Address with prefix length.
    pub address: IpNetwork,
    /// Gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Place of its interface in the result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
    /// `4` or `6`, for callers before 1.0.0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}

/// A route in a result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Destination.
    pub dst: IpNetwork,
    /// Gateway.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
}

impl AddResult {
    /// The result in the form of another version.
    #[must_use]
    pub fn for_version(mut self, version: &str) -> Self {
        version.clone_into(&mut self.cni_version);
        let before_1_0 = version.starts_with("0.");
        for ip in &mut self.ips {
            let family = if ip.address.is_ipv4() { "4" } else { "6" };
            ip.version = before_1_0.then(|| family.to_owned());
        }
        if version != "1.1.0" {
            for interface in &mut self.interfaces {
                interface.mtu = None;
            }
        }
        self
    }
}

/// Answer to VERSION.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VersionResult {
    /// Version of the answer.
    pub cni_version: String,
    /// All that the plugin speaks.
    pub supported_versions: Vec<String>,
}

impl VersionResult {
    /// The answer to a caller of `version`.
    #[must_use]
    pub fn new(version: &str) -> Self {
        Self {
            cni_version: version.to_owned(),
            supported_versions: VERSIONS.iter().map(|v| (*v).to_owned()).collect(),
        }
    }
}

/// The environment of a call, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// What is asked for.
    pub command: Command,
    /// Container id; empty for commands without one.
    pub container_id: String,
    /// Path of the container's network namespace; may be empty for DEL.
    pub netns: String,
    /// Interface name in the container.
    pub ifname: String,
    /// Namespace of the workload.
    pub namespace: String,
    /// Name of the workload.
    pub name: String,
}

impl Call {
    /// Reads the CNI_* variables.
    ///
    /// # Errors
    /// [`code::INVALID_ENVIRONMENT`], naming the variable.
    pub fn from_environment(get: impl Fn(&str) -> Option<String>) -> Result<Self, CniError> {
        let command = match get("CNI_COMMAND").as_deref() {
            Some("ADD") => Command::Add,
            Some("DEL") => Command::Del,
            Some("CHECK") => Command::Check,
            Some("GC") => Command::Gc,
            Some("STATUS") => Command::Status,
            Some("VERSION") => Command::Version,
            Some(other) => {
                return Err(invalid(
                    "CNI_COMMAND",
                    &format!("{other:?} is not ADD, DEL, CHECK, GC, STATUS or VERSION"),
                ));
            }
            None => return Err(invalid("CNI_COMMAND", "it is not set")),
        };
        let mut call = Self {
            command,
            container_id: String::new(),
            netns: get("CNI_NETNS").unwrap_or_default(),
            ifname: String::new(),
            namespace: String::new(),
            name: String::new(),
        };
        if matches!(command, Command::Gc | Command::Status | Command::Version) {
            return Ok(call);
        }
        call.container_id = get("CNI_CONTAINERID").unwrap_or_default();
        check_container_id(&call.container_id)?;
        call.ifname = get("CNI_IFNAME").unwrap_or_default();
        check_ifname(&call.ifname)?;
        if call.netns.is_empty() && command != Command::Del {
            return Err(invalid("CNI_NETNS", "it is not set"));
        }
        for (key, value) in get("CNI_ARGS")
            .unwrap_or_default()
            .split(';')
            .filter_map(|pair| pair.split_once('='))
        {
            match key {
                "K8S_POD_NAMESPACE" => value.clone_into(&mut call.namespace),
                "K8S_POD_NAME" => value.clone_into(&mut call.name),
                _ => {}
            }
        }
        if command == Command::Add && (call.namespace.is_empty() || call.name.is_empty()) {
            return Err(invalid(
                "CNI_ARGS",
                "K8S_POD_NAMESPACE and K8S_POD_NAME must name the workload",
            ));
        }
        Ok(call)
    }
}

fn check_container_id(id: &str) -> Result<(), CniError> {
    let first = id.bytes().next().is_some_and(|c| c.is_ascii_alphanumeric());
    let rest = id
        .bytes()
        .all(|c| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'.' | b'-'));
    if first && rest && id.len() <= CONTAINER_ID_BYTES_MAX {
        return Ok(());
    }
    Err(invalid(
        "CNI_CONTAINERID",
        &format!(
            "{id:?} is not 1 to {CONTAINER_ID_BYTES_MAX} letters, digits, '_', '.' and '-', starting with a letter or digit"
        ),
    ))
}

fn check_ifname(name: &str) -> Result<(), CniError> {
    let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    if name.is_empty()
        || name.len() > IFNAME_BYTES_MAX
        || matches!(name, "." | "..")
        || name.contains(bad)
    {
        return Err(invalid(
            "CNI_IFNAME",
            &format!("{name:?} is not the name of an interface"),
        ));
    }
    Ok(())
}

fn invalid(variable: &str, reason: &str) -> CniError {
    CniError::new(
        code::INVALID_ENVIRONMENT,
        format!("environment variable {variable} cannot be used"),
        reason,
    )
}

impl Config {
    /// Reads the configuration.
    ///
    /// # Errors
    /// [`code::DECODING_FAILURE`] for what is not JSON of this shape or too large,
    /// [`code::INCOMPATIBLE_VERSION`] for a version that the plugin does not speak.
    pub fn from_json(json: &[u8]) -> Result<Self, CniError> {
        let failure = |details: String| {
            CniError::new(
                code::DECODING_FAILURE,
                "the network configuration on standard input cannot be read",
                details,
            )
        };
        if json.len() > CONFIG_BYTES_MAX {
            return Err(failure(format!(
                "{} bytes, {CONFIG_BYTES_MAX} are taken",
                json.len()
            )));
        }
        let config: Self =
            serde_json::from_slice(json).map_err(|error| failure(error.to_string()))?;
        if !VERSIONS.contains(&config.cni_version.as_str()) {
            return Err(CniError::new(
                code::INCOMPATIBLE_VERSION,
                format!("cniVersion {:?} is not supported", config.cni_version),
                format!("use one of {}", VERSIONS.join(", ")),
            ));
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests;
