//! Flow records from the kernel to listeners; the programs write them only while somebody listens.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clustermesh_api::v1::Flow;
use clustermesh_ebpf::abi::{
    DropReason, FlowRecord, HOOK_FROM_HOST, HOOK_FROM_NETWORK, HOOK_FROM_POD, HOOK_FROM_WIREGUARD,
    HOOK_TO_NETWORK, TrafficPath, VERDICT_FORWARDED,
};
use clustermesh_ebpf::{FlowReader, Maps};
use clustermesh_node_core::tables::ip;
use tokio::sync::broadcast;
use tracing::warn;

use crate::settings_map::SettingsMap;

/// Records that wait for one listener; beyond, the oldest are lost and counted.
pub const FLOWS_WAITING_MAX: usize = 4_096;
/// The ring is looked at this often while somebody listens: it holds 16,384 records.
const RING_LOOKED_AT_EVERY: Duration = Duration::from_millis(10);

/// Distributes flow records. Clones share it.
#[derive(Clone)]
pub struct Flows {
    maps: Maps,
    settings: SettingsMap,
    sender: broadcast::Sender<FlowRecord>,
    running: Arc<Mutex<bool>>,
}

impl Flows {
    /// Nobody listens yet.
    #[must_use]
    pub fn new(maps: Maps, settings: SettingsMap) -> Self {
        Self {
            maps,
            settings,
            sender: broadcast::Sender::new(FLOWS_WAITING_MAX),
            running: Arc::default(),
        }
    }

    /// Listens; the first listener makes the programs write.
    ///
    /// # Errors
    /// The ring cannot be mapped, or the settings cannot be written.
    pub fn listen(&self) -> anyhow::Result<broadcast::Receiver<FlowRecord>> {
        let receiver = self.sender.subscribe();
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if !*running {
            let ring = self.maps.flows()?;
            self.settings.set_flows(true)?;
            *running = true;
            tokio::spawn(self.clone().pump(ring));
        }
        Ok(receiver)
    }

    async fn pump(self, mut ring: FlowReader) {
        loop {
            tokio::time::sleep(RING_LOOKED_AT_EVERY).await;
            while let Some(record) = ring.next_record() {
                // Without a listener there is nothing to do with it.
                let _ = self.sender.send(record);
            }
            let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            if self.sender.receiver_count() == 0 {
                if let Err(error) = self.settings.set_flows(false) {
                    warn!(%error, "the kernel programs go on writing flow records");
                }
                *running = false;
                return;
            }
        }
    }
}

/// The wire form of a record.
#[must_use]
pub fn flow(record: &FlowRecord, lost: u64) -> Flow {
    let hook = match record.hook {
        HOOK_FROM_POD => "from-pod",
        HOOK_FROM_HOST => "from-host",
        HOOK_FROM_NETWORK => "from-network",
        HOOK_FROM_WIREGUARD => "from-wireguard",
        HOOK_TO_NETWORK => "to-network",
        _ => "unknown",
    };
    let number = record.path_or_reason as usize;
    let verdict = if record.verdict == VERDICT_FORWARDED {
        let path = TrafficPath::ALL.get(number).map_or("unknown", |p| p.name());
        format!("forwarded:{path}")
    } else {
        let reason = DropReason::ALL.get(number).map_or("unknown", |r| r.name());
        format!("dropped:{reason}")
    };
    Flow {
        time_ns: record.time_ns,
        hook: hook.to_owned(),
        source: ip(&record.source).to_string(),
        destination: ip(&record.destination).to_string(),
        source_port: u32::from(u16::from_be_bytes(record.source_port_be)),
        destination_port: u32::from(u16::from_be_bytes(record.destination_port_be)),
        protocol: u32::from(record.protocol),
        source_identity: record.source_identity,
        verdict,
        length: record.length_bytes,
        lost,
    }
}
