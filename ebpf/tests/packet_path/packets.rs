//! Every program on single packets.
use crate::support::bpf::Datapath;

#[test]
fn loads() {
    let d = Datapath::load();
    let o = d.run("from_pod", &[0; 60]);
    assert_eq!(o.verdict, 2);
    assert_eq!(d.all_drops(), [("not-configured", 1)]);
}
