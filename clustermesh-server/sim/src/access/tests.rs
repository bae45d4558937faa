use bytes::Bytes;

use super::{Access, Asker, Dump, Range, Said};

fn range(first: &str, end: &str, reads: bool, writes: bool) -> Range {
    Range {
        first: first.to_owned().into(),
        end: end.to_owned().into(),
        reads,
        writes,
    }
}

/// From auth revision 5 on user `u` reads k1, from 6 on nothing.
fn access() -> Access {
    let access = Access::default();
    let dump = |ranges, since| Dump {
        grants: [("u".to_owned(), Some(ranges)), ("root".to_owned(), None)].into(),
        since,
    };
    let readable = vec![range("k1", "k2", true, false)];
    access.0.lock().insert(5, dump(readable, 10));
    access.0.lock().insert(6, dump(Vec::new(), 20));
    access
}

fn asker(user: &str, auth_revision: u64, floor: u64) -> Asker {
    Asker {
        user: user.to_owned(),
        auth_revision,
        floor,
    }
}

fn key() -> Bytes {
    Bytes::from_static(b"k1")
}

#[test]
fn what_is_permitted_may_be_done_and_nothing_else() {
    let access = access();
    let (reads, writes) = ([(key(), false)], [(key(), true)]);
    access.check(&asker("u", 5, 5), &reads, Said::Done).unwrap();
    access
        .check(&asker("u", 5, 5), &reads, Said::Denied)
        .unwrap_err();
    access
        .check(&asker("u", 5, 5), &writes, Said::Done)
        .unwrap_err();
    access
        .check(&asker("u", 5, 5), &writes, Said::Denied)
        .unwrap();
    access
        .check(&asker("root", 6, 6), &writes, Said::Done)
        .unwrap();
    access
        .check(&asker("nobody", 6, 6), &reads, Said::Done)
        .unwrap_err();
}

#[test]
fn outdated_permissions_count_for_serializable_reads_only() {
    let access = access();
    let reads = [(key(), false)];
    access
        .check(&asker("u", 5, 6), &reads, Said::Done)
        .unwrap_err();
    access
        .check(&asker("u", 5, 6), &reads, Said::DoneHere)
        .unwrap();
}

#[test]
fn events_are_seen_only_with_a_permission_of_their_time_or_later() {
    let access = access();
    access.check_seen("u", 15, &[key()]).unwrap();
    access.check_seen("u", 20, &[key()]).unwrap();
    access.check_seen("u", 21, &[key()]).unwrap_err();
    access.check_seen("root", 21, &[key()]).unwrap();
}
