//! The rules that kube-proxy would write for the benchmarks' services, in its iptables and its nftables mode.
//!
//! What matters is their shape: one rule a service in a chain that is walked, or one element of a map that is
//! looked up; then a random backend, then its address.

use std::fmt::Write as _;

use super::services::{BACKEND_PORT, BACKENDS, POD_CIDR, PORT, Services};

/// Input of `iptables-restore`.
pub(super) fn iptables(services: Services) -> String {
    let mut chains = String::new();
    let mut entry = String::new();
    let mut rules = String::new();
    // Writing to a String cannot fail.
    for service in 0..services.count {
        let (vip, svc) = (services.address(service), svc_chain(service));
        let name = format!("bench/service-{service}:http");
        let _ = writeln!(chains, ":{svc} - [0:0]");
        let _ = writeln!(
            entry,
            "-A KUBE-SERVICES -d {vip}/32 -p tcp -m comment --comment \"{name} cluster IP\" -m tcp --dport {PORT} -j {svc}"
        );
        let _ = writeln!(
            rules,
            "-A {svc} ! -s {POD_CIDR} -d {vip}/32 -p tcp -m comment --comment \"{name} cluster IP\" -m tcp --dport {PORT} -j KUBE-MARK-MASQ"
        );
        for (place, backend) in (0..BACKENDS).zip(services.backends(service)) {
            let sep = format!("KUBE-SEP-{:016}", service * BACKENDS + place);
            let _ = writeln!(chains, ":{sep} - [0:0]");
            let left = BACKENDS - place;
            let chance = if left > 1 {
                let probability = 1.0 / f64::from(left);
                format!("-m statistic --mode random --probability {probability:.11} ")
            } else {
                String::new()
            };
            let _ = writeln!(
                rules,
                "-A {svc} -m comment --comment \"{name} -> {backend}:{BACKEND_PORT}\" {chance}-j {sep}\n\
                 -A {sep} -s {backend}/32 -m comment --comment \"{name}\" -j KUBE-MARK-MASQ\n\
                 -A {sep} -p tcp -m comment --comment \"{name}\" -m tcp -j DNAT --to-destination {backend}:{BACKEND_PORT}"
            );
        }
    }
    format!(
        "*nat\n:PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\n\
         :KUBE-SERVICES - [0:0]\n:KUBE-POSTROUTING - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n{chains}\
         -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES\n\
         -A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING\n\
         -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n\
         -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n\
         -A KUBE-POSTROUTING -j MASQUERADE --random-fully\n{entry}{rules}COMMIT\n"
    )
}

fn svc_chain(service: u32) -> String {
    format!("KUBE-SVC-{service:016}")
}

/// Input of `nft -f`.
pub(super) fn nftables(services: Services) -> String {
    let mut chains = String::new();
    let mut elements = String::new();
    for service in 0..services.count {
        let vip = services.address(service);
        let name = format!("service-{service:08}-bench/service/tcp/http");
        let mut numbers = Vec::new();
        for (place, backend) in (0..BACKENDS).zip(services.backends(service)) {
            let endpoint = format!(
                "endpoint-{:08}-bench/service/tcp/http__{backend}/{BACKEND_PORT}",
                service * BACKENDS + place
            );
            let _ = writeln!(
                chains,
                "  chain {endpoint} {{\n    ip saddr {backend} jump mark-for-masquerade\n    meta l4proto tcp dnat to {backend}:{BACKEND_PORT}\n  }}"
            );
            numbers.push(format!("{place} : goto {endpoint}"));
        }
        let _ = writeln!(
            chains,
            "  chain {name} {{\n    ip daddr {vip} tcp dport {PORT} ip saddr != {POD_CIDR} jump mark-for-masquerade\n    \
             numgen random mod {BACKENDS} vmap {{ {} }}\n  }}",
            numbers.join(", ")
        );
        let _ = writeln!(elements, "      {vip} . tcp . {PORT} : goto {name},");
    }
    format!(
        "table ip kube-proxy {{\n  chain mark-for-masquerade {{\n    meta mark set meta mark | 0x4000\n  }}\n{chains}\
         \x20 map service-ips {{\n    type ipv4_addr . inet_proto . inet_service : verdict\n    elements = {{\n{elements}    }}\n  }}\n\
         \x20 chain services {{\n    ip daddr . meta l4proto . th dport vmap @service-ips\n  }}\n\
         \x20 chain masquerading {{\n    meta mark & 0x4000 == 0 return\n    meta mark set meta mark ^ 0x4000\n    masquerade fully-random\n  }}\n\
         \x20 chain nat-prerouting {{\n    type nat hook prerouting priority dstnat; policy accept;\n    jump services\n  }}\n\
         \x20 chain nat-output {{\n    type nat hook output priority -100; policy accept;\n    jump services\n  }}\n\
         \x20 chain nat-postrouting {{\n    type nat hook postrouting priority srcnat; policy accept;\n    jump masquerading\n  }}\n}}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn iptables_walks_one_rule_a_service_and_the_measured_one_is_last() {
        let text = iptables(Services { count: 3 });
        let entry: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with("-A KUBE-SERVICES "))
            .collect();
        assert_eq!(entry.len(), 3);
        assert!(entry[2].contains("10.96.0.3/32"));
        let probabilities: Vec<&str> = text
            .lines()
            .filter(|line| line.contains("KUBE-SVC-0000000000000002") && line.contains("->"))
            .filter_map(|line| line.split("--probability ").nth(1))
            .map(|rest| &rest[..4])
            .collect();
        assert_eq!(probabilities, ["0.20", "0.25", "0.33", "0.50"]);
        assert_eq!(text.matches("-j DNAT").count(), 15);
    }

    #[test]
    fn nftables_has_one_element_a_service_and_one_chain_a_backend() {
        let text = nftables(Services { count: 3 });
        assert_eq!(text.matches(". tcp . 80 : goto ").count(), 3);
        assert_eq!(text.matches("dnat to").count(), 15);
        assert_eq!(text.matches("numgen random mod 5").count(), 3);
    }
}
