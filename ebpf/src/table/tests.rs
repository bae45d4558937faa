use std::collections::BTreeMap;

use clustermesh_ebpf_abi::{IPCACHE_PREFIX_BASE_BITS, IpcacheKey, IpcacheValue, v4_mapped};

use super::*;

const HASH: u32 = 1;
const ARRAY: u32 = 2;
const TRIE: u32 = 11;
const NO_PREALLOC: u32 = 1;

fn create<K, V>(map_type: u32, capacity: u32, flags: u32) -> OwnedFd {
    bpf::map_create(map_type, size_of::<K>(), size_of::<V>(), capacity, flags)
        .expect("these tests make BPF maps: run them as root")
}

fn hash(capacity: u32) -> Table<u32, u64> {
    let fd = create::<u32, u64>(HASH, capacity, NO_PREALLOC);
    Table::new(fd, "hash", capacity)
}

fn trie() -> Table<IpcacheKey, IpcacheValue> {
    let fd = create::<IpcacheKey, IpcacheValue>(TRIE, 1 << 14, NO_PREALLOC);
    Table::new(fd, "trie", 1 << 14)
}

fn by_elements<K: Plain, V: Plain>(table: Table<K, V>) -> Table<K, V> {
    table.forgo_batches();
    table
}

fn prefix(i: u16) -> IpcacheKey {
    let [high, low] = i.to_be_bytes();
    // Both hosts and networks that cover some of them.
    let (last, bits) = if i.is_multiple_of(10) {
        (0, 24)
    } else {
        (1, 32)
    };
    IpcacheKey {
        prefix_len_bits: IPCACHE_PREFIX_BASE_BITS + 96 + bits,
        cluster_id_be: [0, 0],
        reserved: [0, 0],
        address: v4_mapped([10, high, low, last]),
    }
}

/// Fills, overwrites and thins out the table; checks it against a model after every step.
fn agrees_with_model<K, V>(table: &Table<K, V>, pairs: &[(K, V)], other: V, absent: K)
where
    K: Plain + Ord + std::fmt::Debug,
    V: Plain + PartialEq + std::fmt::Debug,
{
    let mut model: BTreeMap<K, V> = pairs.iter().copied().collect();
    let check = |model: &BTreeMap<K, V>, step: &str| {
        let found: BTreeMap<K, V> = table.entries().unwrap().into_iter().collect();
        assert_eq!(&found, model, "{step}");
        assert_eq!(table.len().unwrap(), model.len(), "{step}");
        assert_eq!(table.is_empty().unwrap(), model.is_empty(), "{step}");
    };
    assert!(table.is_empty().unwrap());
    table.upsert(pairs).unwrap();
    check(&model, "filled");

    let some: Vec<K> = model.keys().copied().step_by(3).collect();
    let overwritten: Vec<_> = some.iter().map(|key| (*key, other)).collect();
    table.upsert(&overwritten).unwrap();
    model.extend(overwritten);
    check(&model, "overwritten");

    // Absent keys at the front, in the middle and at the end, and one twice.
    let mut doomed = vec![absent];
    doomed.extend(&some);
    doomed.extend([absent, some[0], some[0], absent]);
    table.delete(&doomed).unwrap();
    model.retain(|key, _| !some.contains(key));
    check(&model, "thinned out");

    // One that comes, one that changes, one that stays, and all others go.
    let few: Vec<K> = model.keys().copied().take(2).collect();
    let wanted = BTreeMap::from([(absent, other), (few[0], other), (few[1], model[&few[1]])]);
    table.replace_all(&wanted).unwrap();
    model = wanted;
    check(&model, "replaced");

    let rest: Vec<K> = model.keys().copied().collect();
    table.delete(&rest).unwrap();
    check(&BTreeMap::new(), "emptied");
}

#[test]
fn hash_agrees_with_model_with_batches_and_without() {
    let pairs: Vec<_> = (0..10_000).map(|i| (i, u64::from(i) << 20)).collect();
    for table in [hash(1 << 14), by_elements(hash(1 << 14))] {
        let batches = table.uses_batches();
        agrees_with_model(&table, &pairs, 7, 1_000_000);
        assert_eq!(
            table.uses_batches(),
            batches,
            "batches were refused on the way"
        );
    }
}

#[test]
fn trie_agrees_with_model_with_batches_and_without() {
    let pairs: Vec<_> = (0..5_000)
        .map(|i| {
            let value = IpcacheValue {
                identity: u32::from(i),
                node_index: 1,
            };
            (prefix(i), value)
        })
        .collect();
    let other = IpcacheValue {
        identity: 9,
        node_index: 9,
    };
    // Older kernels refuse them for tries, which is found out on the way.
    let offered = crate::features::kernel().unwrap().0 >= (5, 13);
    for table in [trie(), by_elements(trie())] {
        let batches = table.uses_batches() && offered;
        agrees_with_model(&table, &pairs, other, prefix(60_001));
        assert_eq!(
            table.uses_batches(),
            batches,
            "batches were refused on the way"
        );
    }
}

#[test]
fn trie_finds_the_longest_prefix() {
    let value = |identity| IpcacheValue {
        identity,
        node_index: 0,
    };
    let table = trie();
    let network = prefix(10);
    let host = IpcacheKey {
        prefix_len_bits: network.prefix_len_bits + 8,
        address: v4_mapped([10, 0, 10, 4]),
        ..network
    };
    let neighbour = IpcacheKey {
        address: v4_mapped([10, 0, 10, 5]),
        ..host
    };
    table
        .upsert(&[(network, value(1)), (host, value(2))])
        .unwrap();
    assert_eq!(table.get(&host).unwrap(), Some(value(2)));
    assert_eq!(table.get(&neighbour).unwrap(), Some(value(1)));
    assert_eq!(table.get(&prefix(20)).unwrap(), None);
}

#[test]
fn full_hash_is_its_own_error_and_overwriting_still_works() {
    for table in [hash(8), by_elements(hash(8))] {
        let pairs: Vec<(u32, u64)> = (0..9).map(|i| (i, 1)).collect();
        match table.upsert(&pairs) {
            Err(Error::MapFull {
                map: "hash",
                capacity: 8,
            }) => {}
            other => panic!("{other:?}"),
        }
        assert_eq!(table.len().unwrap(), 8);
        table.upsert(&[(0, 5)]).unwrap();
        assert_eq!(table.get(&0).unwrap(), Some(5));
    }
}

#[test]
fn full_trie_is_its_own_error() {
    let fd = create::<IpcacheKey, IpcacheValue>(TRIE, 2, NO_PREALLOC);
    let table = Table::<IpcacheKey, IpcacheValue>::new(fd, "trie", 2);
    let value = IpcacheValue {
        identity: 1,
        node_index: 1,
    };
    let pairs: Vec<_> = (1..4).map(|i| (prefix(i), value)).collect();
    assert!(matches!(
        table.upsert(&pairs),
        Err(Error::MapFull {
            map: "trie",
            capacity: 2
        })
    ));
}

#[test]
fn array_shows_what_is_not_zeros() {
    let fd = create::<u32, u64>(ARRAY, 10_000, 0);
    let table = ArrayTable::<u64>::new(fd, "array", 10_000);
    assert!(table.is_empty().unwrap());
    let pairs: Vec<(u32, u64)> = (0..10_000).step_by(7).map(|i| (i, 3)).collect();
    table.upsert(&pairs).unwrap();
    assert_eq!(table.entries().unwrap(), pairs);
    table.clear(&[0, 7]).unwrap();
    assert_eq!(table.get(0).unwrap(), None);
    assert_eq!(table.get(14).unwrap(), Some(3));
    assert_eq!(table.get(20_000).unwrap(), None);
    assert_eq!(table.len().unwrap(), pairs.len() - 2);
    assert!(matches!(
        table.upsert(&[(10_000, 1)]),
        Err(Error::MapFull { map: "array", .. })
    ));
}

#[test]
fn errors_name_map_keys_and_cause() {
    // Not a map at all.
    let null = std::fs::File::open("/dev/null").unwrap();
    let table = Table::<u32, u64>::new(null.into(), "broken", 4);
    let error = table.upsert(&[(1, 1), (2, 2)]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot write 2 keys of the map broken: Invalid argument (os error 22)"
    );
}
