use proptest::prelude::*;

use super::*;

const CONFIRM_MS: u64 = 15_000;
const RAISE_AFTER_MS: u64 = CONFIRM_MS * RAISE_AFTER_CONFIRMATIONS;
const RAISE_AFTER_MAX_MS: u64 = CONFIRM_MS * RAISE_AFTER_CONFIRMATIONS_MAX;
/// Time from a change of the path until what is usable is right again, for the sizes of these tests.
const SETTLED_MS: u64 = CONFIRM_MS + 2 * RAISE_AFTER_MAX_MS + 100_000;

/// A path that loses what is larger than `limit`, without a word; 0: everything.
struct Simulation {
    path: PathMtu,
    now_ms: u64,
    limit: u16,
    sent: Vec<(u64, u16)>,
}

impl Simulation {
    fn new(most_bytes: u16, limit: u16) -> Self {
        Self {
            path: PathMtu::new(most_bytes, CONFIRM_MS, 0),
            now_ms: 0,
            limit,
            sent: Vec::new(),
        }
    }

    fn run(&mut self, time_ms: u64) {
        let end = self.now_ms + time_ms;
        while self.path.due_ms() <= end {
            self.now_ms = self.now_ms.max(self.path.due_ms());
            if let Some(size) = self.path.poll(self.now_ms) {
                self.sent.push((self.now_ms, size));
                if size <= self.limit {
                    self.now_ms += 20;
                    self.path.answered(size, self.now_ms);
                }
            }
        }
        self.now_ms = end;
    }
}

#[test]
fn a_path_that_takes_what_its_devices_do_is_proven_by_one_probe_and_confirmed_now_and_then() {
    let mut path = Simulation::new(1_390, 1_500);
    path.run(4 * CONFIRM_MS);
    assert_eq!(path.path.usable_bytes(), 1_390);
    assert!(!path.path.is_black_hole());
    assert!(path.sent.iter().all(|(_, size)| *size == 1_390));
    assert!((4..=5).contains(&path.sent.len()), "{:?}", path.sent);
}

#[test]
fn a_path_that_narrows_is_narrow_at_once_then_measured_and_forgiven_when_it_widens() {
    let mut path = Simulation::new(1_390, 1_500);
    path.run(60_000);
    path.limit = 1_333;
    path.run(CONFIRM_MS + 2 * u64::from(ATTEMPTS_MAX) * ANSWER_WAIT_MS + 200);
    assert!(path.path.is_black_hole());
    assert!((BASE_BYTES..=1_333).contains(&path.path.usable_bytes()));
    path.run(25_000);
    let found = path.path.usable_bytes();
    assert!((1_333 - STEP_BYTES..=1_333).contains(&found), "{found}");
    path.limit = 1_500;
    path.run(RAISE_AFTER_MS * 2 + CONFIRM_MS + 2_000);
    assert_eq!(path.path.usable_bytes(), 1_390);
    assert!(!path.path.is_black_hole());
}

#[test]
fn silence_concludes_nothing() {
    let mut path = Simulation::new(1_390, 1_500);
    path.run(60_000);
    path.limit = 0;
    path.run(3_600_000);
    assert_eq!(path.path.usable_bytes(), 1_390);
    assert!(!path.path.has_answered());
    path.limit = 1_500;
    path.run(CONFIRM_MS + 10_000);
    assert!(path.path.has_answered());
    assert!(!path.path.is_black_hole());
}

#[test]
fn an_answer_that_nobody_waits_for_proves_nothing() {
    let mut path = PathMtu::new(1_390, CONFIRM_MS, 0);
    assert_eq!(path.poll(0), Some(1_390));
    path.answered(1_380, 5);
    path.answered(SMALL_BYTES, 5);
    assert!(!path.has_answered());
    path.answered(1_390, 6);
    assert!(path.has_answered());
    assert_eq!(path.poll(7), None);
}

#[test]
fn what_an_earlier_run_has_found_holds_until_more_is_proven() {
    for (limit, least, most) in [(1_333, 1_325, 1_333), (1_500, 1_390, 1_390)] {
        let mut path = Simulation::new(1_390, limit);
        path.path = PathMtu::new(1_390, CONFIRM_MS, 0).with_usable(1_320);
        assert_eq!(path.path.usable_bytes(), 1_320);
        assert!(path.path.is_black_hole());
        path.run(3 * RAISE_AFTER_MS);
        assert!((least..=most).contains(&path.path.usable_bytes()));
    }
}

#[test]
fn another_device_size_is_followed() {
    let mut path = Simulation::new(1_390, 1_500);
    path.run(20_000);
    path.path.set_most(1_290, path.now_ms);
    assert_eq!(path.path.usable_bytes(), 1_290);
    path.path.set_most(1_450, path.now_ms);
    assert_eq!(path.path.usable_bytes(), 1_450);
    path.limit = 1_400;
    path.run(60_000);
    assert!(path.path.is_black_hole());
    // The operator has lowered the devices' size to what passes.
    path.path.set_most(1_380, path.now_ms);
    assert!(!path.path.is_black_hole());
}

proptest! {
    #[test]
    fn what_is_usable_passes_and_little_is_given_away(
        most in BASE_BYTES..9_000,
        limits in prop::collection::vec((LEAST_BYTES..9_100, any::<bool>()), 1..5),
    ) {
        let mut path = Simulation::new(most, 0);
        for (limit, outage_before) in limits {
            if outage_before {
                path.limit = 0;
                let before = path.path.usable_bytes();
                path.run(100_000);
                prop_assert_eq!(path.path.usable_bytes(), before);
            }
            path.limit = limit;
            path.run(SETTLED_MS);
            let usable = path.path.usable_bytes();
            prop_assert!(usable <= limit, "{} over {}", usable, limit);
            let best = most.min(limit);
            prop_assert!(usable + STEP_BYTES >= best, "{} of {}", usable, best);
            prop_assert_eq!(path.path.is_black_hole(), limit < most);
        }
        prop_assert!(path.sent.iter().all(|(_, size)| *size <= most));
        // One probe at a time, and the next one after its answer or its time.
        prop_assert!(path.sent.windows(2).all(|pair| pair[0].0 < pair[1].0));
    }

    #[test]
    fn an_outage_is_no_black_hole_whenever_it_begins_and_ends(
        most in BASE_BYTES..9_000,
        begins_ms in 0..4 * CONFIRM_MS,
        lasts_ms in 1..8 * CONFIRM_MS,
    ) {
        let mut path = Simulation::new(most, 9_000);
        path.run(begins_ms);
        path.limit = 0;
        path.run(lasts_ms);
        path.limit = 9_000;
        for _ in 0..400 {
            path.run(100);
            prop_assert!(!path.path.is_black_hole());
        }
        prop_assert!(path.path.has_answered());
    }

    #[test]
    fn a_settled_path_costs_few_probes(most in BASE_BYTES..9_000, limit in LEAST_BYTES..9_100) {
        let mut path = Simulation::new(most, limit);
        path.run(SETTLED_MS);
        let before = path.sent.len() as u64;
        path.run(10 * RAISE_AFTER_MAX_MS);
        let sent = path.sent.len() as u64 - before;
        let confirmations = 10 * RAISE_AFTER_MAX_MS / CONFIRM_MS;
        prop_assert!(sent <= confirmations + 10 * 60, "{}", sent);
    }
}
