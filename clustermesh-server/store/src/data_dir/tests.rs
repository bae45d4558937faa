use super::*;

fn identity() -> Identity {
    Identity {
        replica_id: 7,
        cluster_name: "east".into(),
        cluster_id: 0,
    }
}

#[test]
fn a_created_folder_opens_again_with_its_identity() {
    let dir = tempfile::tempdir().unwrap();
    assert!(!DataDir::is_used(dir.path()).unwrap());
    drop(DataDir::create(dir.path(), identity()).unwrap());
    assert!(DataDir::is_used(dir.path()).unwrap());
    assert_eq!(
        DataDir::open(dir.path(), "east").unwrap().identity(),
        &identity()
    );
}

#[test]
fn a_folder_in_use_is_refused_until_it_is_let_go() {
    let dir = tempfile::tempdir().unwrap();
    let first = DataDir::create(dir.path(), identity()).unwrap();
    assert!(matches!(
        DataDir::open(dir.path(), "east"),
        Err(StoreError::InUse { .. })
    ));
    drop(first);
    DataDir::open(dir.path(), "east").unwrap();
}

#[test]
fn the_wrong_folder_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(
        DataDir::open(&dir.path().join("none"), "east"),
        Err(StoreError::Empty { .. })
    ));
    assert!(matches!(
        DataDir::open(dir.path(), "east"),
        Err(StoreError::Empty { .. })
    ));
    drop(DataDir::create(dir.path(), identity()).unwrap());
    assert!(matches!(
        DataDir::create(dir.path(), identity()),
        Err(StoreError::NotEmpty { .. })
    ));
    let error = DataDir::open(dir.path(), "west").unwrap_err().to_string();
    assert!(error.contains("east") && error.contains("west"), "{error}");
}

#[test]
fn a_damaged_identity_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    drop(DataDir::create(dir.path(), identity()).unwrap());
    let path = dir.path().join(IDENTITY);
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    assert!(matches!(
        DataDir::open(dir.path(), "east"),
        Err(StoreError::Damaged { .. })
    ));
}
