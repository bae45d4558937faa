//! The services of the benchmarks: as many as asked for, five backends each, the measured one last.

use std::net::Ipv4Addr;

use anyhow::Result;
use clustermesh_ebpf::Maps;
use clustermesh_ebpf_abi::{BackendKey, BackendValue, FrontendKey, FrontendValue, v4_mapped};

/// Backends of a service.
pub(super) const BACKENDS: u32 = 5;
/// Services, where many are measured.
pub(super) const SERVICES: u32 = 10_000;
/// Port of every virtual address.
pub(super) const PORT: u16 = 80;
/// Port of every backend.
pub(super) const BACKEND_PORT: u16 = 8080;
/// All virtual addresses.
pub(super) const VIRTUAL_CIDR: &str = "10.96.0.0/12";
/// Where pods have their addresses: [`client`] and all backends.
pub(super) const POD_CIDR: &str = "10.128.0.0/9";

const VIRTUAL_BASE: u32 = u32::from_be_bytes([10, 96, 0, 1]);
const POD_BASE: u32 = u32::from_be_bytes([10, 128, 0, 0]);
const MEASURED_BASE: u32 = u32::from_be_bytes([10, 200, 0, 0]);

/// Services numbered from 0, of which the last one has backends that answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Services {
    /// How many.
    pub(super) count: u32,
}

impl Services {
    /// Virtual address of a service.
    pub(super) fn address(self, service: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(VIRTUAL_BASE + service)
    }

    /// The service that is measured.
    pub(super) fn measured(self) -> u32 {
        self.count - 1
    }

    /// Backends of a service, ascending.
    pub(super) fn backends(self, service: u32) -> impl Iterator<Item = Ipv4Addr> {
        let base = if service == self.measured() {
            MEASURED_BASE + 1
        } else {
            POD_BASE + service * BACKENDS
        };
        (0..BACKENDS).map(move |backend| Ipv4Addr::from_bits(base + backend))
    }

    /// The key of a service's virtual address.
    pub(super) fn frontend(self, service: u32) -> FrontendKey {
        FrontendKey {
            address: v4_mapped(self.address(service).octets()),
            port_be: PORT.to_be_bytes(),
            protocol: 6,
            reserved: 0,
        }
    }

    /// The entries of both maps: list `n + 1` is service `n`'s.
    pub(super) fn entries(self) -> Entries {
        let mut entries = Entries::default();
        for service in 0..self.count {
            let list_id = service + 1;
            let key = self.frontend(service);
            for (slot, backend) in (0..).zip(self.backends(service)) {
                let value = BackendValue {
                    frontend_tag: key.tag(),
                    address: v4_mapped(backend.octets()),
                    port_be: BACKEND_PORT.to_be_bytes(),
                    cluster_id: 1,
                };
                entries.backends.push((BackendKey { list_id, slot }, value));
            }
            let value = FrontendValue {
                list_id,
                backend_count: 5,
                flags: 0,
            };
            entries.frontends.push((key, value));
        }
        entries
    }
}

/// The address from which the measured service is used.
pub(super) fn client() -> Ipv4Addr {
    Ipv4Addr::from_bits(MEASURED_BASE + 100)
}

/// Contents of the service maps.
#[derive(Clone, Debug, Default)]
pub(super) struct Entries {
    /// Backend lists.
    pub(super) backends: Vec<(BackendKey, BackendValue)>,
    /// Virtual addresses.
    pub(super) frontends: Vec<(FrontendKey, FrontendValue)>,
}

impl Entries {
    /// Writes them, in batches.
    pub(super) fn write(&self, maps: &Maps) -> Result<()> {
        maps.backends.upsert(&self.backends)?;
        maps.frontends.upsert(&self.frontends)?;
        Ok(())
    }
}
