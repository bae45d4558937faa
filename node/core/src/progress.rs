//! How far the stream has been handled: the vector of revisions, one for each source cluster.

use std::collections::BTreeMap;

use crate::change::ClusterName;

/// A place in the history of one cluster's store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// The store.
    pub store_id: u64,
    /// Its revision.
    pub revision: i64,
}

/// Revisions by source cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vector(BTreeMap<ClusterName, Position>);

impl Vector {
    /// Moves a source; another store replaces the position, the same one only moves it forward.
    pub fn advance(&mut self, cluster: &ClusterName, position: Position) {
        let held = self.0.entry(cluster.clone()).or_default();
        if held.store_id != position.store_id || held.revision < position.revision {
            *held = position;
        }
    }

    /// The position in one source.
    #[must_use]
    pub fn get(&self, cluster: &str) -> Option<Position> {
        self.0.get(cluster).copied()
    }

    /// Drops a source that is no peer any more.
    pub fn forget(&mut self, cluster: &str) {
        self.0.remove(cluster);
    }

    /// All sources, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&ClusterName, Position)> {
        self.0.iter().map(|(name, position)| (name, *position))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(store_id: u64, revision: i64) -> Position {
        Position { store_id, revision }
    }

    #[test]
    fn a_source_moves_forward_only_while_its_store_is_the_same() {
        let east: ClusterName = "east".into();
        let mut vector = Vector::default();
        vector.advance(&east, at(7, 10));
        vector.advance(&east, at(7, 9));
        assert_eq!(vector.get("east"), Some(at(7, 10)));
        vector.advance(&east, at(8, 3));
        assert_eq!(vector.get("east"), Some(at(8, 3)));
        vector.forget("east");
        assert_eq!(vector.iter().count(), 0);
    }
}
