//! Claims of endpoints: what the server was told in this session, and what it answered.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use clustermesh_api::v1::session_request::Message as Request;
use clustermesh_api::v1::session_response::Message as Response;
use clustermesh_api::v1::{DeleteEndpoint, SyncEndpoints, UpsertEndpoint};
use clustermesh_node_core::ipam::Attachment;
use tracing::warn;

use crate::state_files::StoredEndpoint;

/// Refusals that are remembered, so that each is logged once.
const REFUSALS_TOLD_MAX: usize = 1_024;

/// What a request was about.
enum Pending {
    Sync(Vec<Attachment>),
    Upsert(Attachment),
    Other(&'static str),
}

fn object_of(attachment: &Attachment) -> String {
    format!("endpoint of container {}", attachment.container_id)
}

/// Claims of one session.
#[derive(Default)]
pub struct Claims {
    next_request: u64,
    pending: HashMap<u64, Pending>,
    /// Told to the server, answered or not.
    claimed: HashMap<Attachment, Vec<IpAddr>>,
    stored: HashSet<Attachment>,
    refused: HashSet<Attachment>,
    /// The last refusal of each object that was logged.
    told: HashMap<String, String>,
}

impl Claims {
    fn request(&mut self, pending: Pending) -> u64 {
        self.next_request += 1;
        self.pending.insert(self.next_request, pending);
        self.next_request
    }

    /// A number for a report of readiness.
    pub fn readiness_request(&mut self) -> u64 {
        self.request(Pending::Other("report of readiness"))
    }

    /// The complete set: the first message of a session.
    pub fn sync(&mut self, present: &[StoredEndpoint]) -> Request {
        self.claimed = present
            .iter()
            .map(|e| (e.attachment.clone(), e.addresses.clone()))
            .collect();
        let attachments = present.iter().map(|e| e.attachment.clone()).collect();
        let request_id = self.request(Pending::Sync(attachments));
        Request::SyncEndpoints(SyncEndpoints {
            request_id,
            endpoints: present.iter().map(|e| upsert(0, e)).collect(),
        })
    }

    /// What must be told, given the present endpoints: first what is gone, since its addresses may be in use again.
    pub fn update(&mut self, present: &[StoredEndpoint]) -> Vec<Request> {
        let by_attachment: HashMap<&Attachment, &StoredEndpoint> =
            present.iter().map(|e| (&e.attachment, e)).collect();
        let gone: Vec<Attachment> = self
            .claimed
            .iter()
            .filter(|(attachment, addresses)| {
                by_attachment
                    .get(attachment)
                    .is_none_or(|endpoint| &endpoint.addresses != *addresses)
            })
            .map(|(attachment, _)| attachment.clone())
            .collect();
        let mut requests = Vec::new();
        for attachment in gone {
            let addresses = self.claimed.remove(&attachment).unwrap_or_default();
            self.stored.remove(&attachment);
            let request_id = self.request(Pending::Other("removal of an endpoint"));
            requests.push(Request::DeleteEndpoint(DeleteEndpoint {
                request_id,
                addresses: addresses.iter().map(ToString::to_string).collect(),
            }));
        }
        for endpoint in present {
            if self.claimed.contains_key(&endpoint.attachment) {
                continue;
            }
            self.claimed
                .insert(endpoint.attachment.clone(), endpoint.addresses.clone());
            let request_id = self.request(Pending::Upsert(endpoint.attachment.clone()));
            requests.push(Request::UpsertEndpoint(upsert(request_id, endpoint)));
        }
        requests
    }

    /// Takes an answer.
    pub fn answer(&mut self, response: Option<Response>) {
        match response {
            Some(Response::Ack(ack)) => match self.pending.remove(&ack.request_id) {
                Some(Pending::Sync(attachments)) => {
                    let claimed = &self.claimed;
                    self.stored
                        .extend(attachments.into_iter().filter(|a| claimed.contains_key(a)));
                }
                Some(Pending::Upsert(attachment)) if self.claimed.contains_key(&attachment) => {
                    self.told.remove(&object_of(&attachment));
                    self.stored.insert(attachment);
                }
                _ => {}
            },
            Some(Response::Refused(refused)) => {
                let object = match self.pending.remove(&refused.request_id) {
                    Some(Pending::Upsert(attachment)) => {
                        let object = object_of(&attachment);
                        self.refused.insert(attachment);
                        object
                    }
                    Some(Pending::Sync(attachments)) => {
                        // One of them is at fault: each is claimed for itself.
                        self.refused.extend(attachments);
                        "all endpoints".to_owned()
                    }
                    Some(Pending::Other(what)) => what.to_owned(),
                    None => "an unknown request".to_owned(),
                };
                // The same answer to the same claim, made again every second, says nothing new.
                if self.told.get(&object) != Some(&refused.message) {
                    warn!(object, reason = ?refused.reason(), message = refused.message, "the server refuses a claim");
                    if self.told.len() >= REFUSALS_TOLD_MAX {
                        self.told.clear();
                    }
                    self.told.insert(object, refused.message);
                }
            }
            Some(Response::Welcome(_)) | None => {}
        }
    }

    /// Refused claims count as never made, so that they are made again.
    pub fn forget_refused(&mut self) {
        for attachment in self.refused.drain() {
            self.claimed.remove(&attachment);
        }
    }

    /// Endpoints that the server has stored.
    #[must_use]
    pub fn stored(&self) -> &HashSet<Attachment> {
        &self.stored
    }
}

fn upsert(request_id: u64, endpoint: &StoredEndpoint) -> UpsertEndpoint {
    UpsertEndpoint {
        request_id,
        namespace: endpoint.namespace.clone(),
        name: endpoint.name.clone(),
        addresses: endpoint.addresses.iter().map(ToString::to_string).collect(),
    }
}

#[cfg(test)]
mod tests {
    use clustermesh_api::v1::{Ack, Refused};

    use super::*;

    fn endpoint(id: &str, ip: &str) -> StoredEndpoint {
        StoredEndpoint {
            attachment: Attachment {
                container_id: id.to_owned(),
                ifname: "eth0".to_owned(),
            },
            namespace: "shop".to_owned(),
            name: id.to_owned(),
            netns: String::new(),
            addresses: vec![ip.parse().unwrap()],
            identity: 70_000,
            host_interface: String::new(),
            ifindex: 9,
            host_mac: [0; 6],
            pod_mac: [0; 6],
            mtu: 1450,
        }
    }

    #[test]
    fn only_differences_are_told_after_the_first_sync() {
        let mut claims = Claims::default();
        let first = [endpoint("a", "10.1.0.4")];
        assert!(matches!(claims.sync(&first), Request::SyncEndpoints(_)));
        assert!(claims.update(&first).is_empty());
        let next = [endpoint("b", "10.1.0.4")];
        let told = claims.update(&next);
        assert!(matches!(
            told.as_slice(),
            [Request::DeleteEndpoint(_), Request::UpsertEndpoint(_)]
        ));
        assert!(claims.update(&next).is_empty());
    }

    #[test]
    fn a_claim_is_stored_when_it_is_acknowledged() {
        let mut claims = Claims::default();
        let present = [endpoint("a", "10.1.0.4")];
        claims.sync(&present);
        assert!(claims.stored().is_empty());
        claims.answer(Some(Response::Ack(Ack {
            request_id: 1,
            revision: 5,
        })));
        assert_eq!(claims.stored().len(), 1);
        claims.update(&[]);
        assert!(claims.stored().is_empty());
    }

    #[test]
    fn a_refused_claim_is_made_again() {
        let mut claims = Claims::default();
        claims.sync(&[]);
        let present = [endpoint("a", "10.1.0.4")];
        assert_eq!(claims.update(&present).len(), 1);
        claims.answer(Some(Response::Refused(Refused {
            request_id: 2,
            reason: 2,
            message: "no such workload".to_owned(),
        })));
        assert!(claims.update(&present).is_empty());
        claims.forget_refused();
        // Told to delete nothing: the server never had it.
        assert!(matches!(
            claims.update(&present).as_slice(),
            [Request::UpsertEndpoint(_)]
        ));
    }
}
