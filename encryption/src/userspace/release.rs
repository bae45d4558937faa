//! Lets the packets go that were held while this device took over from another.

use std::sync::Arc;

use super::events::{Event, Events};
use super::handover::Handover;
use super::outbound::Outbound;
use super::shared::Shared;
use super::turn::Way;

/// Works until the handover is stopped.
pub fn run(handover: &Handover, shared: &Arc<Shared>, events: &Events) {
    let mut outbound = Outbound::new(Arc::clone(shared), events.clone());
    while let Some(peers) = handover.next() {
        outbound.reset();
        let table = shared.table();
        for (peer, way) in &peers {
            peer.open(*way);
            if *way == Way::Inward {
                continue;
            }
            let ready = peer.read(|state| state.sessions.current.clone().zip(state.endpoint));
            if let (Some((session, to)), Some(sockets)) = (ready, table.sockets.first()) {
                outbound.send_staged(peer, &session, to, sockets);
            } else {
                // What waits goes when there is a session.
                events.offer(Event::Wanted(peer.slot));
            }
        }
        // Workers hold what came in.
        shared.wake_all();
    }
}
