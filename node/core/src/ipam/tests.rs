use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

fn attachment(n: u32) -> Attachment {
    Attachment {
        container_id: format!("c{n}"),
        ifname: "eth0".to_owned(),
    }
}

fn ipam(v4: &str) -> Ipam {
    let mut ipam = Ipam::default();
    ipam.set_ranges(v4.parse().ok(), "fd00:1::/64".parse().ok());
    ipam
}

#[test]
fn the_first_pod_gets_the_fourth_address_and_the_node_the_first_two() {
    let mut ipam = ipam("10.1.0.0/24");
    let ips = ipam.allocate(&attachment(1), 0).unwrap();
    let expected: [IpAddr; 2] = ["10.1.0.4".parse().unwrap(), "fd00:1::4".parse().unwrap()];
    assert_eq!(ips, expected);
    assert_eq!(ipam.routers()[0].to_string(), "10.1.0.1");
    assert_eq!(ipam.health()[1].to_string(), "fd00:1::2");
}

#[test]
fn the_same_attachment_keeps_its_addresses() {
    let mut ipam = ipam("10.1.0.0/24");
    let first = ipam.allocate(&attachment(1), 0).unwrap();
    assert_eq!(ipam.allocate(&attachment(1), 5).unwrap(), first);
}

#[test]
fn a_released_address_rests_for_a_minute_of_wall_clock() {
    // .4, .5, .6 are pods' addresses.
    let mut ipam = ipam("10.1.0.0/29");
    for n in 0..3 {
        ipam.allocate(&attachment(n), 0).unwrap();
    }
    let released = ipam.release(&attachment(1), 1_000);
    let text = serde_json::to_string(&ipam).unwrap();
    let mut ipam: Ipam = serde_json::from_str(&text).unwrap();
    let error = ipam.allocate(&attachment(9), 60_999).unwrap_err();
    assert_eq!(
        error,
        IpamError::Exhausted {
            cidr: "10.1.0.0/29".parse().unwrap(),
            used: 2,
            resting: 1
        }
    );
    assert_eq!(
        ipam.allocate(&attachment(9), 61_000).unwrap()[0],
        released[0]
    );
}

#[test]
fn a_clock_that_is_set_back_frees_no_address_early_and_holds_none_for_ever() {
    let mut ipam = ipam("10.1.0.0/29");
    for n in 0..3 {
        ipam.allocate(&attachment(n), 0).unwrap();
    }
    ipam.release(&attachment(1), 10_000_000);
    assert!(ipam.allocate(&attachment(9), 5_000).is_err());
    assert!(ipam.allocate(&attachment(9), 64_999).is_err());
    assert!(ipam.allocate(&attachment(9), 65_000).is_ok());
}

#[test]
fn a_node_without_a_range_says_so() {
    assert_eq!(
        Ipam::default().allocate(&attachment(1), 0),
        Err(IpamError::NoRange)
    );
}

proptest! {
    #[test]
    fn no_address_has_two_owners_or_returns_too_soon(
        steps in prop::collection::vec((0u32..12, any::<bool>(), 0u64..30_000), 1..200)
    ) {
        let mut ipam = ipam("10.1.0.0/28");
        let mut now = 0;
        let mut freed: Vec<(IpAddr, u64)> = Vec::new();
        for (n, add, wait) in steps {
            now += wait;
            if add {
                let had = ipam.addresses(&attachment(n)).is_some();
                if let Ok(ips) = ipam.allocate(&attachment(n), now) && !had {
                    for ip in ips {
                        let soon = freed.iter().any(|(f, at)| *f == ip && now - at < REUSE_AFTER_MS);
                        prop_assert!(!soon);
                    }
                }
            } else {
                freed.extend(ipam.release(&attachment(n), now).into_iter().map(|ip| (ip, now)));
            }
            let all: Vec<IpAddr> = ipam.allocations().flat_map(|(_, ips)| ips.to_vec()).collect();
            prop_assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
            let text = serde_json::to_string(&ipam).unwrap();
            prop_assert_eq!(serde_json::from_str::<Ipam>(&text).unwrap(), ipam.clone());
        }
    }
}
