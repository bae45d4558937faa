//! Fuzz targets: everything that reads bytes of clients, disks, replicas, peers, machines, operators and the wire.
//!
//! A target takes any bytes, panics where a property does not hold, and says whether the bytes got past the first door. `run.sh` feeds the
//! targets from libFuzzer; the crate's test replays the seeds and `corpus/`.

mod agents;
mod input;
// The command has no library of its own: this is all that it reads of operators.
#[path = "../../cli/src/manifests.rs"]
pub mod manifests;
mod operators;
mod peers;
mod replicas;
mod requests;
mod stored;
mod txn;
mod wireguard;

/// One way for bytes into the project.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, and that of its folder in `corpus/`.
    pub name: &'static str,
    /// Takes any bytes; true when they were read as something and not refused at once.
    pub run: fn(&[u8]) -> bool,
    /// Inputs that are read as something, to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All targets.
pub const TARGETS: [Target; 14] = [
    Target {
        name: "etcd_request",
        run: requests::grpc,
        seeds: requests::grpc_seeds,
    },
    Target {
        name: "json_request",
        run: requests::json,
        seeds: requests::json_seeds,
    },
    Target {
        name: "txn_model",
        run: txn::like_the_model,
        seeds: txn::seeds,
    },
    Target {
        name: "snapshot_file",
        run: stored::snapshot_file,
        seeds: stored::snapshot_file_seeds,
    },
    Target {
        name: "snapshot_state",
        run: stored::snapshot_state,
        seeds: stored::snapshot_state_seeds,
    },
    Target {
        name: "log_record",
        run: stored::log_record,
        seeds: stored::log_record_seeds,
    },
    Target {
        name: "replica_message",
        run: replicas::message,
        seeds: replicas::seeds,
    },
    Target {
        name: "peer_records",
        run: peers::records,
        seeds: peers::seeds,
    },
    Target {
        name: "agent_stream",
        run: agents::stream,
        seeds: agents::stream_seeds,
    },
    Target {
        name: "node_session",
        run: agents::session,
        seeds: agents::session_seeds,
    },
    Target {
        name: "operator_files",
        run: operators::files,
        seeds: operators::seeds,
    },
    Target {
        name: "wireguard_datagram",
        run: wireguard::datagram,
        seeds: wireguard::datagram_seeds,
    },
    Target {
        name: "wireguard_offload",
        run: wireguard::offload,
        seeds: wireguard::offload_seeds,
    },
    Target {
        name: "wireguard_control",
        run: wireguard::control,
        seeds: wireguard::control_seeds,
    },
];

/// The target of this name.
#[must_use]
pub fn find(name: &str) -> Option<Target> {
    TARGETS.into_iter().find(|target| target.name == name)
}
