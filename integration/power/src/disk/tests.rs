use super::*;

fn name(name: &str) -> &OsStr {
    OsStr::new(name)
}

fn with_file(data: &[u8]) -> (Disk, u64) {
    let mut disk = Disk::default();
    let file = disk.create(ROOT, name("f"), false).unwrap().node;
    disk.write(file, 0, data).unwrap();
    disk.sync(file).unwrap();
    disk.sync(ROOT).unwrap();
    (disk, file)
}

fn content(disk: &Disk) -> Option<Vec<u8>> {
    let found = disk.lookup(ROOT, name("f")).ok()?;
    Some(disk.read(found.node, 0, usize::MAX).unwrap().to_vec())
}

#[test]
fn what_was_synced_survives_every_cut_and_the_rest_some() {
    let (mut disk, file) = with_file(&[1; 4000]);
    disk.write(file, 4000, &[2; 4000]).unwrap();
    let found: BTreeSet<Vec<u8>> = (0..200)
        .map(|seed| content(&disk.cut(seed)).unwrap())
        .collect();
    assert!(found.iter().all(|content| content[..4000] == [1; 4000]));
    assert!(
        found.iter().any(|content| content.len() == 4000),
        "all lost"
    );
    assert!(
        found
            .iter()
            .any(|content| content.get(4000..) == Some(&[2; 4000])),
        "all kept"
    );
    let torn = |content: &&Vec<u8>| {
        let kept = content[4000..].iter().filter(|byte| **byte == 2).count();
        kept > 0 && kept < 4000
    };
    assert!(found.iter().any(|content| torn(&content)), "some kept");
    assert_eq!(content(&disk.cut(7)), content(&disk.cut(7)));
}

#[test]
fn a_sector_is_never_mixed_from_two_moments() {
    let (mut disk, file) = with_file(&[0; SECTOR_BYTES]);
    disk.write(file, 0, &[1; 100]).unwrap();
    disk.write(file, 100, &[2; 100]).unwrap();
    for seed in 0..100 {
        let found = content(&disk.cut(seed)).unwrap();
        // The second write's sector holds the first one too.
        assert!(found[100] != 2 || found[0] == 1, "seed {seed}");
    }
}

#[test]
fn a_name_needs_a_sync_of_its_folder() {
    let mut disk = Disk::default();
    let file = disk.create(ROOT, name("f"), false).unwrap().node;
    disk.write(file, 0, b"data").unwrap();
    disk.sync(file).unwrap();
    assert!((0..50).any(|seed| content(&disk.cut(seed)).is_none()));
    disk.sync(ROOT).unwrap();
    disk.rename(ROOT, name("f"), name("g")).unwrap();
    for seed in 0..50 {
        let found = disk.cut(seed);
        let (old, new) = (found.lookup(ROOT, name("f")), found.lookup(ROOT, name("g")));
        assert!(old.is_ok() != new.is_ok(), "a rename is whole: seed {seed}");
    }
    disk.sync(ROOT).unwrap();
    assert!((0..50).all(|seed| disk.cut(seed).lookup(ROOT, name("g")).is_ok()));
}

#[test]
fn a_failed_sync_is_not_made_good_by_the_next() {
    let (mut disk, file) = with_file(b"old");
    disk.write(file, 0, b"new").unwrap();
    disk.fail_sync(file).unwrap();
    disk.sync(file).unwrap();
    assert_eq!(content(&disk).unwrap(), b"new");
    assert!((0..20).all(|seed| content(&disk.cut(seed)).unwrap() == b"old"));
}

#[test]
fn a_full_disk_takes_no_more_but_lets_overwrite() {
    let (mut disk, file) = with_file(&[1; 1000]);
    disk.set_capacity_bytes(1500);
    assert_eq!(disk.write(file, 1000, &[0; 501]), Err(Refusal::Full));
    disk.write(file, 1000, &[0; 500]).unwrap();
    disk.write(file, 0, &[0; 1000]).unwrap();
    assert_eq!(disk.most_volatile_bytes(), 1500);
}
