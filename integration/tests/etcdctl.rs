//! etcdctl cannot tell ours from etcd: every command, against both, judged by a table that is checked in.

use std::path::Path;

use clustermesh_integration::judges::etcdctl::run;
use clustermesh_integration::judges::programs::Programs;
use clustermesh_integration::lab::binaries_folder;

/// What each command comes to. `UPDATE=1` writes it anew.
const TABLE: &str = "tests/etcdctl.table";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_command_comes_to_what_the_table_says() {
    let programs = Programs::find(&binaries_folder().unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let outcome = run(&programs, folder.path()).await.unwrap();
    println!("{}", outcome.details);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(TABLE);
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, outcome.table()).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(
        outcome.table(),
        expected,
        "the table is not what was found; where that is right, UPDATE=1 writes it anew"
    );
}
