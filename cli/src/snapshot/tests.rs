use super::*;

#[test]
fn a_list_of_replicas_has_names_and_addresses() {
    let list = |entries: &[&str]| {
        let entries: Vec<String> = entries.iter().map(|&entry| entry.to_owned()).collect();
        members(&entries)
    };
    let three = list(&[
        "r1=https://a:2380",
        "r2=https://[::1]:2380",
        "r3=https://c:2380",
    ])
    .unwrap();
    assert_eq!(three[1].peer_url, "https://[::1]:2380");
    assert_eq!(list(&[]).unwrap(), []);
    for bad in [
        "r1",
        "r1=http://a:2380",
        "=https://a:1",
        "r1=https://a",
        "r1=https://a:0",
        "r1=https://a:1/",
    ] {
        assert!(list(&[bad]).is_err(), "{bad}");
    }
    let two = list(&["r1=https://a:1", "r2=https://b:1"]).unwrap_err();
    assert!(two.to_string().contains("1, 3 or 5"), "{two}");
}
