//! From records to kernel maps: all services at once, and one changed backend.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use clustermesh_api::manifest::{
    API_VERSION, KIND_SERVICE, Metadata, Object, Protocol, ServicePort, ServiceSpec, ServiceStatus,
    StoredService,
};
use clustermesh_api::records::{Endpoint, EndpointPort, EndpointSlice, SERVICE_NAME_LABEL};
use clustermesh_api::{Record, RecordKey, Tree};
use clustermesh_ebpf::Maps;
use clustermesh_ebpf_abi::{BackendKey, IdentitySplit};
use clustermesh_node_core::change::Change;
use clustermesh_node_core::decode::Decoder;
use clustermesh_node_core::plan::Step;
use clustermesh_node_core::tables::Tables;
use clustermesh_node_core::{EncryptionSettings, IPCACHE_WANTED_MAX, Model, Settings};

use super::compare::{Figure, Named, Target, against, alone};
use super::services::{BACKEND_PORT, BACKENDS, Entries, PORT, SERVICES, Services};
use super::site::Site;
use crate::traffic::percentile;

/// Rows of this suite.
pub const IDS: [&str; 3] = ["program-10k", "program-10k-wire", "change-one"];

/// The cluster of the services.
const CLUSTER: &str = "a";
/// Changes in one round of `change-one`.
const CHANGES: u32 = 200;

/// A key and its value as the store has them.
type Stored = (Vec<u8>, Vec<u8>);

/// Measures the rows.
///
/// # Errors
/// When the maps cannot be made or written, or end up with other contents than they should.
pub async fn run_all(rounds: usize, progress: &dyn Fn(&str)) -> Result<Vec<Figure>> {
    let site = Site::new()?;
    let result = measure(&site, rounds, progress).await;
    let removed = site.remove().await;
    let figures = result?;
    removed?;
    Ok(figures)
}

async fn measure(site: &Site, rounds: usize, progress: &dyn Fn(&str)) -> Result<Vec<Figure>> {
    let netns = site.netns("maps", &[], "").await?;
    let cgroup = site.cgroup("maps")?;
    let maps = Maps::open_pinned(&site.datapath("maps", &netns, &cgroup).await?)?;
    let services = Services { count: SERVICES };
    let entries = services.entries();
    let stored: Vec<Stored> = records(services);
    let (mut bare, mut typed, mut wire, mut one) = (vec![], vec![], vec![], vec![]);
    for round in 0..rounds {
        progress(&format!("program: round {} of {rounds}", round + 1));
        for turn in 0..3 {
            match (round + turn) % 3 {
                0 => {
                    let start = Instant::now();
                    entries.write(&maps)?;
                    bare.push(millis(start));
                }
                1 => {
                    let changes = decode(&stored)?;
                    let mut model = Model::new(settings(), Tables::default());
                    let start = Instant::now();
                    list(&mut model, changes, &maps)?;
                    typed.push(millis(start));
                    one.push(change_one(&mut model, services, &maps)?);
                }
                _ => {
                    let start = Instant::now();
                    let mut model = Model::new(settings(), Tables::default());
                    list(&mut model, decode(&stored)?, &maps)?;
                    wire.push(millis(start));
                }
            }
            check_and_clear(&maps, &entries)?;
        }
    }
    let named = |id, row, unit| Named { id, row, unit };
    let bare_name = "bare batch calls";
    Ok(vec![
        against(
            named(
                "program-10k",
                "10,000 services x 5 backends from typed records in memory to maps",
                "ms",
            ),
            &typed,
            bare_name,
            &bare,
            Target::RatioAtMost(4.0),
        ),
        against(
            named(
                "program-10k-wire",
                "the same from stored bytes (JSON, zstd)",
                "ms",
            ),
            &wire,
            bare_name,
            &bare,
            Target::Report,
        ),
        alone(
            named(
                "change-one",
                "one backend changed: stored bytes to map, 99th percentile of 400",
                "ms",
            ),
            &one,
            Target::AtMost(1.0),
        ),
    ])
}

fn millis(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

/// A full listing, as an agent does it at its start.
fn list(model: &mut Model, changes: Vec<Change>, maps: &Maps) -> Result<()> {
    for change in changes {
        model.apply(change);
    }
    model.end_listing();
    carry_out(model, maps)
}

fn carry_out(model: &mut Model, maps: &Maps) -> Result<()> {
    let plan = model.plan();
    for step in plan.steps() {
        match step {
            Step::UpsertBackends(entries) => maps.backends.upsert(entries)?,
            Step::UpsertFrontends(entries) => maps.frontends.upsert(entries)?,
            Step::DeleteFrontends(keys) => maps.frontends.delete(keys)?,
            Step::DeleteBackends(keys) => maps.backends.delete(keys)?,
            other => return Err(anyhow!("unexpected step on map {}", other.map())),
        }
        model.commit(&step);
    }
    model.finish();
    Ok(())
}

/// Changes one backend of one service after another; the 99th percentile, in milliseconds.
fn change_one(model: &mut Model, services: Services, maps: &Maps) -> Result<f64> {
    let mut took = Vec::new();
    for round in 0..CHANGES {
        let service = round * (services.count / CHANGES);
        let mut backends: Vec<Ipv4Addr> = services.backends(service).collect();
        let place = usize::try_from(round % BACKENDS)?;
        backends[place] = Ipv4Addr::from([10, 127, 0, u8::try_from(round)?]);
        for addresses in [backends, services.backends(service).collect()] {
            let (key, value) = slice_record(service, &addresses);
            let start = Instant::now();
            model.apply(decoder().decode(&key, Some(&value)).map_err(refused)?);
            carry_out(model, maps)?;
            took.push(millis(start));
        }
        let frontend = services.frontend(service);
        let held = maps
            .frontends
            .get(&frontend)?
            .context("the frontend is gone")?;
        let slot = u32::try_from(place)?;
        let key = BackendKey {
            list_id: held.list_id,
            slot,
        };
        ensure!(
            maps.backends.get(&key)?.is_some(),
            "the new list is not there"
        );
    }
    took.sort_by(f64::total_cmp);
    Ok(percentile(&took, 99))
}

/// Both contenders must leave the same number of entries behind; then the maps are emptied.
fn check_and_clear(maps: &Maps, entries: &Entries) -> Result<()> {
    let backends: Vec<_> = maps
        .backends
        .entries()?
        .into_iter()
        .map(|(key, _)| key)
        .collect();
    let frontends: Vec<_> = maps
        .frontends
        .entries()?
        .into_iter()
        .map(|(key, _)| key)
        .collect();
    ensure!(
        backends.len() == entries.backends.len() && frontends.len() == entries.frontends.len(),
        "{} backends and {} frontends in the maps, expected {} and {}",
        backends.len(),
        frontends.len(),
        entries.backends.len(),
        entries.frontends.len()
    );
    maps.frontends.delete(&frontends)?;
    maps.backends.delete(&backends)?;
    Ok(())
}

fn settings() -> Settings {
    Settings {
        cluster: CLUSTER.into(),
        cluster_id: 1,
        node: "n1".into(),
        underlay: vec![IpAddr::from([192, 0, 2, 1])],
        split: IdentitySplit::CLUSTERS_255,
        direct_routing: false,
        path_v4: None,
        path_v6: None,
        ipcache_wanted_max: IPCACHE_WANTED_MAX,
        encryption: EncryptionSettings::default(),
    }
}

fn decoder() -> Decoder {
    Decoder::new(CLUSTER.into(), clustermesh_api::IdentitySplit::Clusters255)
}

fn refused(refusal: clustermesh_node_core::refused::Refusal) -> anyhow::Error {
    anyhow!("{}: {}", refusal.object, refusal.detail)
}

fn decode(stored: &[Stored]) -> Result<Vec<Change>> {
    let decoder = decoder();
    stored
        .iter()
        .map(|(key, value)| decoder.decode(key, Some(value)).map_err(refused))
        .collect()
}

/// A service and an endpoint slice for each of the services.
fn records(services: Services) -> Vec<Stored> {
    let declared = (0..services.count).map(|service| service_record(services, service));
    let slices = (0..services.count).map(|service| {
        let backends: Vec<Ipv4Addr> = services.backends(service).collect();
        slice_record(service, &backends)
    });
    declared.chain(slices).collect()
}

fn service_record(services: Services, service: u32) -> Stored {
    let name = format!("service-{service}");
    let stored = StoredService {
        object: Object {
            api_version: API_VERSION.to_owned(),
            kind: KIND_SERVICE.to_owned(),
            metadata: Metadata {
                name: name.clone(),
                namespace: "bench".to_owned(),
                labels: BTreeMap::new(),
                annotations: BTreeMap::from([(
                    "service.cilium.io/global".to_owned(),
                    "true".to_owned(),
                )]),
            },
            spec: ServiceSpec {
                selector: BTreeMap::from([("app".to_owned(), name.clone())]),
                ports: vec![ServicePort {
                    name: "http".to_owned(),
                    protocol: Protocol::Tcp,
                    port: PORT,
                    target_port: Some(BACKEND_PORT),
                }],
                ip_families: Vec::new(),
            },
        },
        status: ServiceStatus {
            cluster_ips: vec![services.address(service).into()],
        },
    };
    let key = RecordKey::StoredService {
        namespace: "bench".to_owned(),
        name,
    };
    stored_pair(&key, &Record::StoredService(stored))
}

fn slice_record(service: u32, backends: &[Ipv4Addr]) -> Stored {
    let name = format!("service-{service}");
    let slice = EndpointSlice {
        cluster: CLUSTER.to_owned(),
        cluster_id: 1,
        namespace: "bench".to_owned(),
        name: name.clone(),
        labels: BTreeMap::from([(SERVICE_NAME_LABEL.to_owned(), name.clone())]),
        annotations: BTreeMap::new(),
        address_type: "IPv4".to_owned(),
        endpoints: backends
            .iter()
            .map(|backend| Endpoint {
                addresses: vec![backend.to_string()],
                node_name: Some("n1".to_owned()),
                ..Endpoint::default()
            })
            .collect(),
        ports: vec![EndpointPort {
            name: Some("http".to_owned()),
            protocol: Some("TCP".to_owned()),
            port: Some(BACKEND_PORT.into()),
            app_protocol: None,
        }],
    };
    let key = RecordKey::EndpointSlice {
        tree: Tree::State,
        cluster: CLUSTER.to_owned(),
        namespace: "bench".to_owned(),
        name,
    };
    stored_pair(&key, &Record::EndpointSlice(slice))
}

fn stored_pair(key: &RecordKey, record: &Record) -> Stored {
    (key.to_string().into_bytes(), record.encode().to_vec())
}
