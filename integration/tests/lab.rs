//! The lab itself: its links behave as asked, and nothing of it stays.

use std::path::Path;
use std::time::Duration;

use clustermesh_integration::lab::host::{cgroup2_root, command_in, run, run_unchecked, sh};
use clustermesh_integration::lab::pod::parse_ping_micros;
use clustermesh_integration::lab::teardown::LABS_DIR;
use clustermesh_integration::lab::{Lab, LabConfig};

async fn ping(netns: &str, to: &str) -> anyhow::Result<f64> {
    let mut command = command_in(netns, None, Path::new("ping"));
    let output = run(command.args(["-n", "-c", "2", "-i", "0.05", "-W", "1", to])).await?;
    parse_ping_micros(&String::from_utf8_lossy(&output.stdout))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_link_between_clusters_delays_cuts_and_heals_and_nothing_stays() {
    let lab = Lab::build(LabConfig::two_by_two().unwrap()).await.unwrap();
    let prefix = lab.prefix().to_owned();
    let from = lab.cluster(0).node(0).netns().to_owned();
    let (to_v4, to_v6) = lab.cluster(1).node(1).underlay_addresses();

    assert!(ping(&from, &to_v4).await.unwrap() < 20_000.0);
    lab.wan().set_delay(Duration::from_millis(40));
    for to in [&to_v4, &to_v6] {
        // The first ones also wait for address resolution on the way.
        ping(&from, to).await.unwrap();
        let micros = ping(&from, to).await.unwrap();
        assert!((80_000.0..120_000.0).contains(&micros), "{to}: {micros} µs");
    }
    lab.wan().set_delay(Duration::ZERO);
    lab.wan().cut();
    let mut command = command_in(&from, None, Path::new("ping"));
    let cut = run_unchecked(command.args(["-n", "-c", "1", "-W", "1", &to_v4]))
        .await
        .unwrap();
    assert!(!cut.status.success());
    assert!(lab.wan().dropped_frames() > 0);
    lab.wan().heal();
    ping(&from, &to_v4).await.unwrap();

    assert_eq!(lab.remove().await, Vec::<String>::new());
    let namespaces = sh("ip", &["netns", "list"]).await.unwrap();
    assert!(!namespaces.contains(&prefix), "{namespaces}");
    assert!(!Path::new(LABS_DIR).join(&prefix).exists());
    assert!(!cgroup2_root().unwrap().join(&prefix).exists());
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&prefix));
}
