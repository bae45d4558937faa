use std::{panic::Location, sync::Arc, time::Duration};

use openraft::async_runtime::{AsyncRuntime, Instant};
use openraft_rt::testing::Suite;

use super::{
    Pulse, SimInstant, SimRuntime, WORLD, Watchdog, begin_life, block_on, elapsed, end_life,
    pause_life, resume_life, set_clock_rate, spawn_in,
};

#[test]
fn it_is_what_openraft_expects_of_a_runtime() {
    Suite::<SimRuntime>::test_all();
}

#[test]
fn tasks_end_with_their_life() {
    block_on(1, async {
        let life = begin_life();
        let task = spawn_in(life, std::future::pending::<()>());
        end_life(life);
        assert!(task.await.is_err());
        assert!(spawn_in(life, async {}).await.is_err());
    });
}

#[test]
fn a_paused_life_stands_still_and_then_finds_its_time_gone() {
    block_on(1, async {
        let life = begin_life();
        let begun = SimInstant::now();
        let task = spawn_in(life, async {
            SimRuntime::sleep(Duration::from_secs(1)).await;
            SimInstant::now()
        });
        pause_life(life);
        SimRuntime::sleep(Duration::from_secs(5)).await;
        resume_life(life);
        assert!(task.await.unwrap() - begun >= Duration::from_secs(5));
    });
}

#[test]
fn each_life_has_a_clock_of_its_own() {
    block_on(1, async {
        for (ppm, least, most) in [(100_000, 900, 920), (-100_000, 1100, 1120)] {
            let life = begin_life();
            set_clock_rate(life, ppm);
            let begun = elapsed();
            let slept = spawn_in(life, async {
                let begun = SimInstant::now();
                SimRuntime::sleep(Duration::from_secs(1)).await;
                SimInstant::now() - begun
            });
            assert!(slept.await.unwrap() >= Duration::from_secs(1));
            let took = (elapsed() - begun).as_millis();
            assert!((least..most).contains(&took), "{took} ms at {ppm} ppm");
        }
    });
}

#[test]
#[should_panic(expected = "stuck: nothing can happen any more")]
fn a_run_in_which_all_wait_is_stuck() {
    block_on(1, async {
        let _waits = spawn_in(WORLD, std::future::pending::<()>());
        std::future::pending::<()>().await;
    });
}

#[test]
fn a_task_that_does_not_return_is_named() {
    let pulse = Arc::new(Pulse::default());
    pulse.beat(7, Location::caller());
    let (told, place) = std::sync::mpsc::channel();
    let _watchdog = Watchdog::start(pulse, Duration::from_millis(50), move |place| {
        told.send(place).unwrap();
    });
    let place = place.recv_timeout(Duration::from_secs(30)).unwrap();
    assert!(
        place.contains("life 7") && place.contains(file!()),
        "{place}"
    );
}
