//! The rows of the store's figures and their goals.

use crate::bench::compare::Target;

/// One row and its goal.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    pub(super) id: &'static str,
    pub(super) what: &'static str,
    pub(super) unit: &'static str,
    pub(super) target: Target,
    /// Measured in one go with the others of its part.
    pub(super) part: Part,
    pub(super) peer: Peer,
}

/// What a row is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    /// The same row of the other contenders: the best of them, where more is better.
    More,
    /// The best of them, where less is better.
    Less,
    /// Another value of ours.
    Own {
        id: &'static str,
        what: &'static str,
    },
}

/// What is measured with one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Put(usize),
    Get { serializable: bool },
    Watch,
    Stall,
    Lease,
    Gaps,
    Million,
    Loaded,
}

impl Part {
    pub(super) const ALL: [Self; 11] = [
        Self::Put(1),
        Self::Put(64),
        Self::Put(256),
        LINEARIZABLE,
        SERIALIZABLE,
        Self::Watch,
        Self::Stall,
        Self::Lease,
        Self::Gaps,
        Self::Million,
        Self::Loaded,
    ];

    /// Whether only ours is measured.
    pub(super) const fn is_ours_alone(self) -> bool {
        matches!(self, Self::Stall)
    }

    /// Replicas that it takes at least.
    pub(super) const fn replicas(self) -> u8 {
        match self {
            Self::Gaps => 3,
            _ => 1,
        }
    }
}

const LINEARIZABLE: Part = Part::Get {
    serializable: false,
};
const SERIALIZABLE: Part = Part::Get { serializable: true };

const fn row(
    id: &'static str,
    what: &'static str,
    unit: &'static str,
    target: Target,
    part: Part,
    peer: Peer,
) -> Row {
    Row {
        id,
        what,
        unit,
        target,
        part,
        peer,
    }
}

const fn own(id: &'static str, what: &'static str) -> Peer {
    Peer::Own { id, what }
}

use Peer::{Less, More};
use Target::{RatioAtLeast, RatioAtMost, Report};

#[rustfmt::skip]
pub(super) const ROWS: [Row; 37] = [
    row("put-1", "puts, 1 client", "puts/s", RatioAtLeast(1.0), Part::Put(1), More),
    row("put-1-p99", "latency of put-1, p99", "ms", Report, Part::Put(1), Less),
    row("put-64", "puts, 64 clients", "puts/s", RatioAtLeast(1.8), Part::Put(64), More),
    row("put-64-p99", "latency of put-64, p99", "ms", RatioAtMost(0.5), Part::Put(64), Less),
    row("put-256", "puts, 256 clients", "puts/s", RatioAtLeast(2.0), Part::Put(256), More),
    row("put-256-p99", "latency of put-256, p99", "ms", RatioAtMost(0.5), Part::Put(256), Less),
    row("get-lin", "linearizable reads, 64 clients", "reads/s", RatioAtLeast(1.3), LINEARIZABLE, More),
    row("get-lin-p99", "latency of get-lin, p99", "ms", Report, LINEARIZABLE, Less),
    row("get-ser", "serializable reads, 64 clients", "reads/s", RatioAtLeast(1.5), SERIALIZABLE, More),
    row("get-ser-p99", "latency of get-ser, p99", "ms", Report, SERIALIZABLE, Less),
    row("watch-1000", "events delivered to 1,000 watchers of one prefix", "events/s", RatioAtLeast(2.0), Part::Watch, More),
    row("watch-1000-p99", "from put to delivery, p99", "ms", RatioAtMost(0.5), Part::Watch, Less),
    row("watch-cpu", "server CPU per million delivered events", "s", RatioAtMost(0.4), Part::Watch, Less),
    row("watch-stall", "10,000 watchers, one stalled: the others' latency, p99", "ms", RatioAtMost(1.1), Part::Stall,
        own("watch-stall-none", "none stalled")),
    row("watch-stall-mem", "memory per replica meanwhile", "MiB", Report, Part::Stall,
        own("watch-stall-mem-none", "none stalled")),
    row("lease-100k", "put with a lease of 100,000 keys, p50", "ms", RatioAtMost(1.1), Part::Lease,
        own("lease-one", "a lease of one key")),
    row("lease-100k-etcd", "the same", "ms", Report, Part::Lease, Less),
    row("gap-leader", "leader killed: longest time without an acknowledged put", "ms", RatioAtMost(1.0), Part::Gaps, Less),
    row("gap-follower", "follower killed and back: the same", "ms", RatioAtMost(1.0), Part::Gaps, Less),
    row("mem-1m", "resident memory per replica with very many keys of 500 B", "MiB", RatioAtMost(0.7), Part::Million, Less),
    row("restart-1m", "from kill -9 of all to serving, with very many keys", "s", RatioAtMost(0.5), Part::Million, Less),
    row("loaded-put-1", "as put-1, loaded", "puts/s", RatioAtLeast(1.0), Part::Loaded, More),
    row("loaded-put-1-p99", "latency", "ms", Report, Part::Loaded, Less),
    row("loaded-put-64", "as put-64, loaded", "puts/s", RatioAtLeast(1.8), Part::Loaded, More),
    row("loaded-put-64-p99", "latency", "ms", RatioAtMost(0.5), Part::Loaded, Less),
    row("loaded-put-256", "as put-256, loaded", "puts/s", RatioAtLeast(2.0), Part::Loaded, More),
    row("loaded-put-256-p99", "latency", "ms", RatioAtMost(0.5), Part::Loaded, Less),
    row("loaded-watch-1000", "as watch-1000, loaded", "events/s", RatioAtLeast(2.0), Part::Loaded, More),
    row("loaded-watch-1000-p99", "latency", "ms", RatioAtMost(0.5), Part::Loaded, Less),
    row("loaded-watch-cpu", "as watch-cpu, loaded, the snapshot's CPU included", "s", Report, Part::Loaded, Less),
    row("quiet-put-64-p99", "latency as in loaded-put-64, but no snapshot is taken", "ms", Report, Part::Loaded, Less),
    row("quiet-put-256-p99", "latency as in loaded-put-256, but no snapshot is taken", "ms", Report, Part::Loaded, Less),
    row("snapshot-put-64-p99", "loaded-put-64-p99", "ms", RatioAtMost(1.5), Part::Loaded,
        own("quiet-put-64-p99", "no snapshot taken")),
    row("snapshot-put-256-p99", "loaded-put-256-p99", "ms", RatioAtMost(1.5), Part::Loaded,
        own("quiet-put-256-p99", "no snapshot taken")),
    row("loaded-snapshot", "a snapshot read to its end, meanwhile", "s", Report, Part::Loaded, Less),
    row("put-64-cpu", "server CPU per 1,000 puts of put-64", "s", Report, Part::Put(64), Less),
    row("get-lin-cpu", "server CPU per 1,000 reads of get-lin", "s", Report, LINEARIZABLE, Less),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_has_an_id_of_its_own_and_a_part_that_is_run() {
        let ids: std::collections::BTreeSet<_> = ROWS.iter().map(|row| row.id).collect();
        assert_eq!(ids.len(), ROWS.len());
        for row in &ROWS {
            assert!(Part::ALL.contains(&row.part), "{}", row.id);
        }
    }
}
