use proptest::prelude::*;

use super::*;
use crate::settings::EncryptionMode;

fn prefix(cluster: &str, kind: PrefixKind, prefix: &str) -> MeshPrefix {
    MeshPrefix {
        cluster: cluster.into(),
        kind,
        prefix: prefix.parse().unwrap(),
    }
}

fn pods(cluster: &str, of: &str) -> MeshPrefix {
    prefix(cluster, PrefixKind::Pods, of)
}

fn held(prefixes: &MeshPrefixes) -> Vec<MeshPrefix> {
    prefixes.iter().cloned().collect()
}

#[test]
fn a_silent_source_takes_nothing_away() {
    let west = pods("west", "10.2.0.0/24");
    let mut prefixes = MeshPrefixes::restored([west.clone()]);
    for now_ms in [0, MESH_PREFIX_GRACE_MS, 100 * MESH_PREFIX_GRACE_MS] {
        assert!(!prefixes.learn(BTreeSet::new(), |_| false, now_ms));
        assert!(!prefixes.has_absent());
    }
    assert_eq!(held(&prefixes), [west]);
}

#[test]
fn what_complete_records_do_not_name_goes_after_a_grace_that_begins_anew_when_it_is_named() {
    let west = pods("west", "10.2.0.0/24");
    let mut prefixes = MeshPrefixes::default();
    let complete = |_: &str| true;
    assert!(prefixes.learn([west.clone()].into(), complete, 0));
    assert!(!prefixes.learn(BTreeSet::new(), complete, 5));
    assert!(prefixes.has_absent());
    assert!(!prefixes.learn([west.clone()].into(), complete, 6));
    assert!(!prefixes.learn(BTreeSet::new(), complete, 7));
    assert!(!prefixes.learn(BTreeSet::new(), complete, 6 + MESH_PREFIX_GRACE_MS));
    assert_eq!(held(&prefixes), [west]);
    assert!(prefixes.learn(BTreeSet::new(), complete, 7 + MESH_PREFIX_GRACE_MS));
    assert_eq!(held(&prefixes), []);
}

#[test]
fn time_without_the_records_does_not_count() {
    let west = pods("west", "10.2.0.0/24");
    let mut prefixes = MeshPrefixes::restored([west.clone()]);
    let complete = |_: &str| true;
    assert!(!prefixes.learn(BTreeSet::new(), complete, 5));
    let cut_until_ms = 3 * MESH_PREFIX_GRACE_MS;
    prefixes.restart_grace(cut_until_ms);
    assert!(prefixes.has_absent());
    let nearly_ms = cut_until_ms + MESH_PREFIX_GRACE_MS - 1;
    assert!(!prefixes.learn(BTreeSet::new(), complete, nearly_ms));
    assert_eq!(held(&prefixes), [west]);
    assert!(prefixes.learn(BTreeSet::new(), complete, nearly_ms + 1));
}

#[test]
fn clusters_that_are_not_encrypted_are_exceptions_from_what_the_operator_lists() {
    let prefixes = MeshPrefixes::restored([
        pods("own", "10.1.0.0/24"),
        pods("west", "10.2.0.0/24"),
        pods("legacy", "10.7.0.0/24"),
        prefix("west", PrefixKind::Node, "10.0.0.2/32"),
    ]);
    let settings = EncryptionSettings {
        mode: EncryptionMode::All,
        clusters: [("legacy".into(), false)].into(),
        strict: true,
    };
    let listed = ["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()];
    let own = ["10.0.0.1".parse().unwrap()];
    let fixed = FixedPrefixes {
        cluster: "own",
        ranges: &["10.1.0.0/16".parse().unwrap()],
        listed: &listed,
        addresses: &own,
    };
    let entries = prefixes.entries(&settings, &fixed);
    let flags = |of: &str| entries[&mesh_key(of.parse().unwrap())].flags;
    assert_eq!(flags("10.1.0.0/24"), MESH_PODS);
    assert_eq!(flags("10.1.0.0/16"), MESH_PODS);
    assert_eq!(flags("10.2.0.0/24"), MESH_PODS);
    assert_eq!(flags("10.7.0.0/24"), 0);
    assert_eq!(flags("10.0.0.2/32"), MESH_NODES);
    assert_eq!(flags("10.0.0.1/32"), 0);
    assert_eq!(flags("10.0.0.0/8"), MESH_LISTED);
    assert_eq!(flags("fd00::/8"), MESH_LISTED);
    assert_eq!(entries.len(), 8);
    let between = EncryptionSettings {
        mode: EncryptionMode::InterCluster,
        ..settings
    };
    let fixed = FixedPrefixes {
        listed: &[],
        addresses: &[],
        ..fixed
    };
    let entries = prefixes.entries(&between, &fixed);
    let flags = |of: &str| entries[&mesh_key(of.parse().unwrap())].flags;
    assert_eq!(flags("10.1.0.0/24"), 0);
    assert_eq!(flags("10.2.0.0/24"), MESH_PODS);
}

#[test]
fn one_prefix_of_two_clusters_is_guarded_if_either_is() {
    let prefixes =
        MeshPrefixes::restored([pods("legacy", "10.2.0.0/24"), pods("west", "10.2.0.0/24")]);
    let settings = EncryptionSettings {
        mode: EncryptionMode::All,
        clusters: [("legacy".into(), false)].into(),
        strict: true,
    };
    let fixed = FixedPrefixes {
        cluster: "own",
        ranges: &[],
        listed: &[],
        addresses: &[],
    };
    let entries = prefixes.entries(&settings, &fixed);
    let only: Vec<_> = entries.values().map(|value| value.flags).collect();
    assert_eq!(only, [MESH_PODS]);
}

proptest! {
    /// Whatever comes and goes: what is named now is held, and what is held was named within the grace or belongs to a
    /// cluster of which nobody knew everything since.
    #[test]
    fn nothing_is_forgotten_early_and_nothing_kept_for_ever(
        steps in prop::collection::vec(
            (prop::collection::btree_set(0..6_u8, 0..6), any::<[bool; 2]>(), 0..400_000_u64),
            1..40,
        ),
    ) {
        let all: Vec<MeshPrefix> = (0..6_u8)
            .map(|n| pods(if n < 3 { "a" } else { "b" }, &format!("10.{n}.0.0/16")))
            .collect();
        let mut prefixes = MeshPrefixes::default();
        let mut now_ms = 0;
        // Since when each is absent from complete records.
        let mut absent: HashMap<MeshPrefix, u64> = HashMap::new();
        let mut expected = BTreeSet::new();
        for (named, complete, passed_ms) in steps {
            now_ms += passed_ms;
            let named: BTreeSet<MeshPrefix> =
                named.into_iter().map(|n| all[usize::from(n)].clone()).collect();
            let is_complete = |cluster: &str| complete[usize::from(cluster == "b")];
            prefixes.learn(named.clone(), is_complete, now_ms);
            for prefix in &all {
                if named.contains(prefix) {
                    absent.remove(prefix);
                    expected.insert(prefix.clone());
                } else if !is_complete(&prefix.cluster) {
                    absent.remove(prefix);
                } else {
                    let since = *absent.entry(prefix.clone()).or_insert(now_ms);
                    if now_ms - since >= MESH_PREFIX_GRACE_MS {
                        expected.remove(prefix);
                    }
                }
            }
            prop_assert_eq!(prefixes.iter().cloned().collect::<BTreeSet<_>>(), expected.clone());
        }
    }
}
