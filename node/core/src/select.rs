//! Which backends of a service are used: affinity, then readiness.

use crate::change::{Affinity, Condition};

/// A backend as far as the choice goes.
pub trait Candidate {
    /// It is in this cluster.
    fn is_local(&self) -> bool;
    /// Its condition.
    fn condition(&self) -> Condition;
}

/// Keeps the backends that take new connections.
///
/// `none` uses all clusters alike. `local` adds the other clusters only while no local
/// backend is ready and another cluster has a usable one; `remote` adds the local ones
/// only while no other cluster has a usable one. Of what is left the ready ones are
/// taken, and draining ones only where none is ready (KEP-1669).
pub fn select<C: Candidate>(candidates: &mut Vec<C>, global: bool, affinity: Affinity) {
    candidates.retain(|c| c.condition() != Condition::Unusable && (global || c.is_local()));
    let any = |local: bool, ready: bool| {
        candidates
            .iter()
            .any(|c| c.is_local() == local && (!ready || c.condition() == Condition::Ready))
    };
    let (locals, remotes) = match affinity {
        Affinity::None => (true, true),
        Affinity::Local => (true, !any(true, true)),
        Affinity::Remote => (!any(false, false), true),
    };
    candidates.retain(|c| if c.is_local() { locals } else { remotes });
    if candidates.iter().any(|c| c.condition() == Condition::Ready) {
        candidates.retain(|c| c.condition() == Condition::Ready);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Condition::{Draining, Ready, Unusable};

    impl Candidate for (bool, Condition) {
        fn is_local(&self) -> bool {
            self.0
        }
        fn condition(&self) -> Condition {
            self.1
        }
    }

    const L: bool = true;
    const R: bool = false;

    fn chosen(
        candidates: &[(bool, Condition)],
        global: bool,
        affinity: Affinity,
    ) -> Vec<(bool, Condition)> {
        let mut list = candidates.to_vec();
        select(&mut list, global, affinity);
        list
    }

    #[test]
    fn a_service_that_is_not_global_uses_its_own_cluster_only() {
        assert_eq!(
            chosen(&[(L, Ready), (R, Ready)], false, Affinity::Remote),
            [(L, Ready)]
        );
    }

    #[test]
    fn without_affinity_all_clusters_share() {
        assert_eq!(
            chosen(&[(L, Ready), (R, Ready)], true, Affinity::None),
            [(L, Ready), (R, Ready)]
        );
    }

    #[test]
    fn affinity_local_switches_as_soon_as_no_local_backend_is_ready() {
        assert_eq!(
            chosen(&[(L, Ready), (R, Ready)], true, Affinity::Local),
            [(L, Ready)]
        );
        assert_eq!(
            chosen(&[(L, Draining), (R, Ready)], true, Affinity::Local),
            [(R, Ready)]
        );
        assert_eq!(
            chosen(&[(L, Unusable), (R, Draining)], true, Affinity::Local),
            [(R, Draining)]
        );
        assert_eq!(
            chosen(&[(L, Draining)], true, Affinity::Local),
            [(L, Draining)]
        );
    }

    #[test]
    fn affinity_remote_falls_back_only_without_any_usable_remote_backend() {
        assert_eq!(
            chosen(&[(L, Ready), (R, Ready)], true, Affinity::Remote),
            [(R, Ready)]
        );
        assert_eq!(
            chosen(&[(L, Ready), (R, Draining)], true, Affinity::Remote),
            [(R, Draining)]
        );
        assert_eq!(
            chosen(&[(L, Ready), (R, Unusable)], true, Affinity::Remote),
            [(L, Ready)]
        );
    }
}
