//! What the first cluster offers before anything is measured.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Result, ensure};
use clustermesh_api::etcd::rpc::{PutRequest, RequestOp, TxnRequest, request_op::Request};

use super::session::workload_name;
use crate::lab::cluster::Cluster;
use crate::scenario::{NAMESPACE, ip_record, node_record, workload};

/// Machines that have the endpoints; they have records but no agent.
const HOSTS: u8 = 40;
/// Endpoints of each.
const ENDPOINTS_PER_HOST: u8 = 250;
/// Third byte of the first one's pod CIDR, far above those that the cluster gives out.
const FIRST_NETWORK: u8 = 100;
/// Last byte of the first one's underlay address.
const FIRST_HOST: u8 = 100;
/// First host number in a pod CIDR that a pod may have.
const FIRST_POD: u8 = 4;
/// Identities that the endpoints take turns with.
const IDENTITIES: u32 = 100;
/// First number of an identity in its cluster, above those that it has given out.
const FIRST_IDENTITY: u32 = 10_000;
/// Writes of one transaction.
const TXN_WRITES: usize = 128;
/// Manifests of one call.
const MANIFESTS: usize = 250;

/// Applies the workloads that are claimed later, all with the same labels.
pub(super) async fn workloads(cluster: &Cluster, count: usize) -> Result<()> {
    let numbers: Vec<usize> = (0..count).collect();
    for part in numbers.chunks(MANIFESTS) {
        let mut manifests = String::new();
        for number in part {
            write!(manifests, "{}", workload(&workload_name(*number), "load"))?;
        }
        cluster.apply(&manifests).await?;
    }
    Ok(())
}

/// Writes 40 nodes with 250 endpoints each as the cluster's operator; the addresses.
pub(super) async fn endpoints(cluster: &Cluster) -> Result<Vec<IpAddr>> {
    let id = cluster.id();
    let mut addresses = Vec::new();
    let mut records = Vec::new();
    for host in 0..HOSTS {
        let underlay = format!("172.30.{id}.{}", FIRST_HOST + host);
        let network = Ipv4Addr::new(10, id, FIRST_NETWORK + host, 0);
        let name = format!("load-{host}");
        let node = (cluster.name(), u32::from(id));
        records.push(node_record(
            "state",
            node,
            &name,
            &underlay,
            &network.to_string(),
        ));
    }
    for host in 0..HOSTS {
        let underlay = format!("172.30.{id}.{}", FIRST_HOST + host);
        for pod in 0..ENDPOINTS_PER_HOST {
            let address = Ipv4Addr::new(10, id, FIRST_NETWORK + host, FIRST_POD + pod);
            let number = u32::from(host) * u32::from(ENDPOINTS_PER_HOST) + u32::from(pod);
            let identity = (u32::from(id) << 16) + FIRST_IDENTITY + number % IDENTITIES;
            let pod = format!("{NAMESPACE}-load-{number}");
            records.push(ip_record(&address.to_string(), identity, &underlay, &pod));
            addresses.push(IpAddr::V4(address));
        }
    }
    let writes: Vec<RequestOp> = records
        .into_iter()
        .map(|(key, value)| RequestOp {
            request: Some(Request::RequestPut(PutRequest {
                key: key.into(),
                value: value.to_string().into(),
                ..PutRequest::default()
            })),
        })
        .collect();
    cluster
        .store()?
        .call(move |client| async move {
            for part in writes.chunks(TXN_WRITES) {
                let request = TxnRequest {
                    success: part.to_vec(),
                    ..TxnRequest::default()
                };
                ensure!(
                    client.txn(request).await?.succeeded,
                    "a write without a condition failed"
                );
            }
            Ok(())
        })
        .await?;
    Ok(addresses)
}
