//! The only writer of the kernel programs' settings: what the node is, and whether somebody listens to its flows.

use std::sync::{Arc, Mutex, PoisonError};

use clustermesh_ebpf::abi::{CONFIG_FLOWS, NodeConfig};
use clustermesh_ebpf::{Error, Maps};

/// The kernel programs' settings. Clones share them.
#[derive(Clone)]
pub struct SettingsMap {
    maps: Maps,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// Without flags of flows. `None` until the server, or the node's files, have told what it is.
    node: Option<NodeConfig>,
    flows: bool,
}

impl SettingsMap {
    /// The kernel keeps what it has until [`Self::set_node`].
    #[must_use]
    pub fn new(maps: Maps) -> Self {
        Self {
            maps,
            state: Arc::default(),
        }
    }

    /// Replaces what the node is. Flow records go on, or stay away, whatever its flags say.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn set_node(&self, node: NodeConfig) -> Result<(), Error> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.node = Some(node);
        self.write(&state)
    }

    /// From now on the programs write flow records, or no more. Before [`Self::set_node`] it takes effect with that.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn set_flows(&self, on: bool) -> Result<(), Error> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.flows = on;
        let written = self.write(&state);
        // Nobody reads them then.
        state.flows = on && written.is_ok();
        written
    }

    fn write(&self, state: &State) -> Result<(), Error> {
        let Some(mut node) = state.node else {
            return Ok(());
        };
        node.flags &= !CONFIG_FLOWS;
        if state.flows {
            node.flags |= CONFIG_FLOWS;
        }
        self.maps.set_config(&node)
    }
}

#[cfg(test)]
mod tests {
    use clustermesh_ebpf::abi::CONFIG_STRICT;

    use super::*;
    use crate::fixture::Fixture;

    fn node(flags: u32) -> NodeConfig {
        NodeConfig {
            flags,
            ..NodeConfig::EMPTY
        }
    }

    #[test]
    fn neither_the_node_nor_its_listeners_undo_what_the_other_has_set() {
        let fixture = Fixture::new("");
        let settings = SettingsMap::new(fixture.maps.clone());
        let flags = || fixture.maps.config().unwrap().map(|config| config.flags);
        let nobody_told = flags();
        settings.set_flows(true).unwrap();
        assert_eq!(flags(), nobody_told, "a node that nobody knows");
        settings.set_node(node(0)).unwrap();
        assert_eq!(flags(), Some(CONFIG_FLOWS));
        settings.set_node(node(CONFIG_STRICT)).unwrap();
        assert_eq!(flags(), Some(CONFIG_STRICT | CONFIG_FLOWS));
        settings.set_flows(false).unwrap();
        assert_eq!(flags(), Some(CONFIG_STRICT));
    }

    #[test]
    fn flags_of_both_hold_when_both_write_at_once() {
        let fixture = Fixture::new("");
        let settings = SettingsMap::new(fixture.maps.clone());
        for round in 0..500 {
            let strict = if round % 2 == 0 { CONFIG_STRICT } else { 0 };
            let listens = round % 3 == 0;
            std::thread::scope(|scope| {
                scope.spawn(|| settings.set_node(node(strict)).unwrap());
                scope.spawn(|| settings.set_flows(listens).unwrap());
            });
            let flows = if listens { CONFIG_FLOWS } else { 0 };
            // Settings of zeros only are the same as none.
            let held = fixture
                .maps
                .config()
                .unwrap()
                .map_or(0, |config| config.flags);
            assert_eq!(held, strict | flows, "round {round}");
        }
    }
}
