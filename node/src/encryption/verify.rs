//! Proves what the status claims: every other node is asked for an echo, and the bytes of it are looked for in the counters of
//! its WireGuard peer.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use clustermesh_api::v1::EncryptionProof;
use clustermesh_encryption::DeviceError;
use clustermesh_encryption_core::key::PublicKey;
use clustermesh_node_core::{Protection, ProvableNode};
use tokio::sync::mpsc;
use tonic::Status;

use super::devices::Encryption;
use crate::echo::ask::{AT_ONCE_MAX, PACKET_BYTES, ask_all};
use crate::records::Reconciler;

/// Proofs that wait in one stream's socket.
pub const PROOFS_WAITING_MAX: usize = 2 * AT_ONCE_MAX;

/// A stream of proofs, one for each node.
pub type Proofs = mpsc::Receiver<Result<EncryptionProof, Status>>;

/// Begins to ask all nodes, [`AT_ONCE_MAX`] at once.
///
/// # Errors
/// The records are not listed yet, or somebody else is at it.
pub fn begin(reconciler: &Reconciler, encryption: &Arc<Encryption>) -> Result<Proofs, Status> {
    let turn = Arc::clone(&encryption.verifications).try_acquire_owned();
    let turn = turn.map_err(|_| {
        Status::resource_exhausted("another verification runs: try again when it has ended")
    })?;
    let nodes = {
        let model = reconciler.model();
        let listed = model.as_ref().filter(|model| model.is_listed());
        listed.map(clustermesh_node_core::Model::provable_nodes)
    };
    let nodes = nodes.ok_or_else(|| {
        Status::failed_precondition(
            "the records have not been listed yet, so that the other nodes are not known: see `server_connected` in \
             `clustermesh-node status`, and try again",
        )
    })?;
    let (sender, receiver) = mpsc::channel(PROOFS_WAITING_MAX);
    let encryption = Arc::clone(encryption);
    tokio::spawn(async move {
        let _turn = turn;
        for batch in nodes.chunks(AT_ONCE_MAX) {
            let proofs = prove(&encryption, batch).await;
            let (proofs, error) = match proofs {
                Ok(proofs) => (proofs, None),
                Err(error) => (Vec::new(), Some(Status::unavailable(error.to_string()))),
            };
            let is_over = error.is_some();
            let all = proofs.into_iter().map(Ok).chain(error.map(Err));
            for proof in all {
                // Whoever asked has gone.
                if sender.send(proof).await.is_err() {
                    return;
                }
            }
            if is_over {
                return;
            }
        }
    });
    Ok(receiver)
}

/// Why nothing could be asked.
#[derive(Debug, thiserror::Error)]
enum ProveError {
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("cannot send echo requests: {0}")]
    Echo(std::io::Error),
    #[error("the agent is ending")]
    Ending,
}

async fn prove(
    encryption: &Arc<Encryption>,
    nodes: &[ProvableNode],
) -> Result<Vec<EncryptionProof>, ProveError> {
    let is_asked = |node: &&ProvableNode| node.is_covered && !node.addresses.is_empty();
    let addresses: Vec<IpAddr> = nodes
        .iter()
        .filter(is_asked)
        .filter_map(|node| node.addresses.first().copied())
        .collect();
    let before = counters(encryption).await?;
    let answers = ask_all(&addresses).await.map_err(ProveError::Echo)?;
    let after = counters(encryption).await?;
    let mut answers = addresses.into_iter().zip(answers);
    let proofs = nodes.iter().map(|node| {
        let asked = if is_asked(&node) {
            answers.next()
        } else {
            None
        };
        proof(node, asked, growth(node, &before, &after))
    });
    Ok(proofs.collect())
}

/// What a device says of a peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counted {
    sent: u64,
    received: u64,
    has_handshake: bool,
}

type Counters = HashMap<PublicKey, Counted>;

async fn counters(encryption: &Arc<Encryption>) -> Result<Counters, ProveError> {
    let encryption = Arc::clone(encryption);
    // Devices are asked by blocking calls.
    let asked = tokio::task::spawn_blocking(move || {
        let mut counters = Counters::new();
        for open in encryption.devices() {
            for (key, status) in open.device.status()?.peers {
                let counted = Counted {
                    sent: status.tx_bytes,
                    received: status.rx_bytes,
                    has_handshake: status.last_handshake.is_some(),
                };
                counters.insert(key, counted);
            }
        }
        Ok(counters)
    });
    asked.await.unwrap_or(Err(ProveError::Ending))
}

/// By how much the counters of a node's peers grew; `None`: no device has any of its keys.
fn growth(node: &ProvableNode, before: &Counters, after: &Counters) -> Option<Counted> {
    let of_keys = node.keys.iter().filter_map(|key| {
        let key = PublicKey(key.key);
        let now = after.get(&key)?;
        // One that came meanwhile began at nothing.
        let then = before.get(&key).copied().unwrap_or_default();
        Some(Counted {
            sent: now.sent.saturating_sub(then.sent),
            received: now.received.saturating_sub(then.received),
            has_handshake: now.has_handshake,
        })
    });
    of_keys.reduce(|one, other| Counted {
        sent: one.sent + other.sent,
        received: one.received + other.received,
        has_handshake: one.has_handshake || other.has_handshake,
    })
}

type Asked = (IpAddr, Option<Duration>);

fn proof(node: &ProvableNode, asked: Option<Asked>, grown: Option<Counted>) -> EncryptionProof {
    let answer = asked.and_then(|(_, answer)| answer);
    let (result, problem) = match problem(node, asked, grown) {
        _ if !node.is_covered => ("exempt", String::new()),
        None => ("encrypted", String::new()),
        Some(problem) => ("failed", problem),
    };
    EncryptionProof {
        cluster: node.cluster.to_string(),
        node: node.node.to_string(),
        result: result.to_owned(),
        address: asked
            .map(|(address, _)| address.to_string())
            .unwrap_or_default(),
        answer_us: answer.map(|answer| u64::try_from(answer.as_micros()).unwrap_or(u64::MAX)),
        sent_bytes: grown.map_or(0, |grown| grown.sent),
        received_bytes: grown.map_or(0, |grown| grown.received),
        problem,
    }
}

/// What is wrong with the way to a node, and what to do about it.
fn problem(node: &ProvableNode, asked: Option<Asked>, grown: Option<Counted>) -> Option<String> {
    let enough = |bytes: u64| bytes >= u64::from(PACKET_BYTES);
    let name = format!("{}/{}", node.cluster, node.node);
    let ports: Vec<String> = node.keys.iter().map(|key| key.port.to_string()).collect();
    if node.keys.is_empty() {
        return Some(format!(
            "it has no key: set encryption.mode in the configuration of {name}'s agent and restart that"
        ));
    }
    let Some(grown) = grown else {
        return Some(format!(
            "no device of this node has its key: see the fault in `clustermesh encryption status`, and whether another \
             node has the same key (refused records in `clustermesh-node status`); {name} may be at another epoch still"
        ));
    };
    if node.protection == Protection::Withheld {
        return Some(format!(
            "nothing is sent to it until its key of this epoch is here: look whether the agent of {name} runs and has a \
             session with its server"
        ));
    }
    if node.kernel_ifindex.is_none() {
        return Some(
            "the kernel does not send its packets into WireGuard: see map failures in this agent's log".to_owned(),
        );
    }
    let Some((address, answer)) = asked else {
        return Some(format!(
            "its record names no address of {name} in the mesh that could be asked: upgrade its agent"
        ));
    };
    match answer {
        Some(_) if enough(grown.sent) && enough(grown.received) => None,
        Some(_) => Some(format!(
            "{address} answered past WireGuard: packets to or from it travel in clear. Look for routes of others to \
             {address} on both nodes (`ip route get {address}`)"
        )),
        None if !grown.has_handshake => Some(format!(
            "no handshake with it: let UDP {} pass between this node and {}, both ways, and look whether `clustermesh \
             encryption status` on {name} knows this node",
            ports.join(" and "),
            node.endpoint.map(|ip| ip.to_string()).unwrap_or_default(),
        )),
        None if !enough(grown.sent) => Some(format!(
            "requests to {address} did not reach WireGuard: see drops in `clustermesh-node status`, and a firewall of \
             this host"
        )),
        None => Some(format!(
            "requests to {address} left encrypted, no answer came: look whether {name} lets echo requests (ping) to it \
             pass, and at drops in `clustermesh-node status` there"
        )),
    }
}

#[cfg(test)]
mod tests {
    use clustermesh_node_core::change::NodeKey;

    use super::*;

    fn node() -> ProvableNode {
        ProvableNode {
            cluster: "b".into(),
            node: "n1".into(),
            addresses: vec!["10.2.0.1".parse().unwrap()],
            is_covered: true,
            protection: Protection::Encrypted { ifindex: 7 },
            kernel_ifindex: Some(7),
            keys: vec![NodeKey {
                epoch: 0,
                key: [2; 32],
                port: 51_871,
            }],
            endpoint: Some("192.0.2.9".parse().unwrap()),
        }
    }

    fn counted(sent: u64, received: u64) -> Counted {
        Counted {
            sent,
            received,
            has_handshake: true,
        }
    }

    fn of(node: &ProvableNode, answered: bool, grown: Option<Counted>) -> EncryptionProof {
        let address = node.addresses.first().copied();
        let answer = answered.then_some(Duration::from_millis(2));
        proof(node, address.map(|address| (address, answer)), grown)
    }

    #[test]
    fn an_echo_is_a_proof_only_with_its_bytes_in_both_counters() {
        let least = u64::from(PACKET_BYTES);
        let good = of(&node(), true, Some(counted(least, least)));
        assert_eq!(
            (good.result.as_str(), good.problem.as_str()),
            ("encrypted", "")
        );
        assert_eq!(good.answer_us, Some(2_000));
        for (sent, received) in [(0, 0), (least - 1, least), (least, 148 + 32)] {
            let bad = of(&node(), true, Some(counted(sent, received)));
            assert_eq!(bad.result, "failed");
            assert!(bad.problem.contains("in clear"), "{}", bad.problem);
        }
    }

    #[test]
    fn every_failure_names_what_to_do() {
        let least = u64::from(PACKET_BYTES);
        let all = Some(counted(least, least));
        let keyless = ProvableNode {
            keys: Vec::new(),
            ..node()
        };
        let withheld = ProvableNode {
            protection: Protection::Withheld,
            ..node()
        };
        let clear = ProvableNode {
            kernel_ifindex: None,
            ..node()
        };
        let nameless = ProvableNode {
            addresses: Vec::new(),
            ..node()
        };
        let silent = Counted {
            has_handshake: false,
            ..counted(444, 0)
        };
        for (node, answered, grown, word) in [
            (&keyless, true, None, "encryption.mode"),
            (&node(), true, None, "no device of this node"),
            (&withheld, true, all, "session"),
            (&clear, true, all, "map failures"),
            (&nameless, false, all, "upgrade"),
            (&node(), false, Some(silent), "UDP 51871"),
            (
                &node(),
                false,
                Some(counted(0, 0)),
                "did not reach WireGuard",
            ),
            (&node(), false, Some(counted(least, 0)), "no answer"),
        ] {
            let proof = of(node, answered, grown);
            assert_eq!(proof.result, "failed", "{word}");
            assert!(proof.problem.contains(word), "{word}: {}", proof.problem);
        }
        let exempt = ProvableNode {
            is_covered: false,
            ..keyless
        };
        let proof = of(&exempt, false, None);
        assert_eq!(
            (proof.result.as_str(), proof.problem.as_str()),
            ("exempt", "")
        );
    }

    #[test]
    fn bytes_of_both_keys_count_and_a_new_peer_begins_at_nothing() {
        let mut changing = node();
        changing.keys.push(NodeKey {
            epoch: 1,
            key: [3; 32],
            port: 51_872,
        });
        let [one, other] = [2, 3].map(|number| PublicKey([number; 32]));
        let before = Counters::from([(one, counted(100, 50))]);
        let after = Counters::from([(one, counted(150, 50)), (other, counted(700, 600))]);
        assert_eq!(growth(&changing, &before, &after), Some(counted(750, 600)));
        assert_eq!(growth(&changing, &after, &Counters::new()), None);
    }
}
