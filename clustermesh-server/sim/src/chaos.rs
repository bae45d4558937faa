//! Blows to the group, and their healing.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use clustermesh_raft::DiskFault;
use openraft::async_runtime::AsyncRuntime;

use crate::{
    member::Member,
    network::Weather,
    runtime::{SimRuntime, WORLD, draw, pause_life, resume_life, spawn_in},
    world::{PATIENCE, World},
};

/// A clock is put forward or back by up to this, ms.
const MAX_CLOCK_STEP_MS: u64 = 3_600_000;

/// What a blow was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Blow {
    /// A replica crashed.
    Crash,
    /// A disk failed or was full.
    Disk,
    /// A replica stood still.
    Pause,
    /// A leader heard nobody, and the others went on without it.
    Deaf,
    /// The membership was to change.
    Membership,
    /// Anything else.
    Other,
}

impl World {
    fn later(
        self: &Arc<Self>,
        ms: std::ops::Range<u64>,
        act: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) {
        let world = self.clone();
        drop(spawn_in(WORLD, async move {
            SimRuntime::sleep(draw(|random| random.time_ms(ms))).await;
            act(&world);
        }));
    }

    fn crash_for_a_while(self: &Arc<Self>, member: &Member) {
        self.crash(member);
        let place = member.index;
        self.later(50..2500, move |world| {
            let down = |member: &&Member| member.is_taken() && !member.is_up();
            if world.members.get(place).filter(down).is_some() {
                world.start(place);
            }
        });
    }

    fn fail_disk(self: &Arc<Self>, member: &Member) {
        let fault = if draw(|random| random.chance(50)) {
            DiskFault::Failed
        } else {
            DiskFault::Full
        };
        member.data().faults().set(Some(fault));
        let (place, life) = (member.index, member.life());
        self.later(500..4000, move |world| {
            let Some(member) = world.members.get(place) else {
                return;
            };
            if member.life() == life {
                // The disk is replaced, or there is room again.
                world.crash(member);
                world.start(place);
            }
        });
    }

    fn pause(self: &Arc<Self>, member: &Member) {
        let Some(life) = member.life() else {
            return;
        };
        pause_life(life);
        self.paused.lock().insert(life);
        self.later(50..4000, move |world| world.resume(life));
    }

    fn resume(&self, life: u64) {
        resume_life(life);
        if self.paused.lock().remove(&life) {
            // What it does with what its disk said meanwhile, it does from now on.
            let now = crate::runtime::elapsed();
            self.disk_failures
                .lock()
                .entry(life)
                .and_modify(|at| *at = now);
            for member in &self.members {
                let mut running = member.running.lock();
                if let Some(running) = running.as_mut().filter(|running| running.life == life)
                    && let Some(at) = &mut running.disk_failed
                {
                    *at = now;
                }
            }
        }
    }

    fn cut_off(&self, index: usize, both_ways: bool) {
        let Some(alone) = self.members.get(index) else {
            return;
        };
        let outwards = draw(|random| random.chance(50));
        for other in self.members.iter().filter(|other| other.index != index) {
            if both_ways || outwards {
                self.network.cut(&alone.url, &other.url);
            }
            if both_ways || !outwards {
                self.network.cut(&other.url, &alone.url);
            }
        }
    }

    /// Between two of them, in one direction or both.
    fn cut_between(&self, one: &Member, other: &Member) {
        self.network.cut(&one.url, &other.url);
        if draw(|random| random.chance(50)) {
            self.network.cut(&other.url, &one.url);
        }
    }

    /// A leader hears no answer, then is cut off; when it comes back the others have forgotten the log that it needs.
    async fn deafen(self: Arc<Self>, index: usize) {
        let Some(deaf) = self.members.get(index) else {
            return;
        };
        self.network.heal();
        let others = || self.members.iter().filter(|other| other.index != index);
        others().for_each(|other| self.network.cut(&other.url, &deaf.url));
        SimRuntime::sleep(draw(|random| random.time_ms(50..300))).await;
        self.cut_off(index, true);
        SimRuntime::sleep(draw(|random| random.time_ms(800..1800))).await;
        for _ in 0..2 {
            for (life, replica) in others().filter_map(Member::alive) {
                let asked = spawn_in(life, async move { drop(replica.snapshot().await) });
                let _late = SimRuntime::timeout(PATIENCE, asked).await;
            }
            SimRuntime::sleep(draw(|random| random.time_ms(100..400))).await;
        }
        self.network.heal();
    }

    /// One blow.
    pub async fn blow(self: &Arc<Self>) -> Blow {
        let taken: Vec<usize> = self.taken().map(|member| member.index).collect();
        let place = taken
            .get(draw(|random| random.place(taken.len())))
            .copied()
            .unwrap_or(0);
        let Some(member) = self.members.get(place) else {
            return Blow::Other;
        };
        let leader = self.leader();
        match draw(|random| random.below(120)) {
            0..18 if member.is_up() => {
                self.crash_for_a_while(member);
                return Blow::Crash;
            }
            18..28 => self.cut_off(place, true),
            28..36 => self.cut_off(place, false),
            36..46 => self.cut_off(leader.unwrap_or(place), true),
            46..50 => {
                let other = taken.get(draw(|random| random.place(taken.len())));
                if let Some(other) = other.and_then(|other| self.members.get(*other)) {
                    self.cut_between(member, other);
                }
            }
            50..70 => self.network.heal(),
            70..77 => self.network.set_weather(
                draw(|random| {
                    Some(Weather {
                        loss_percent: random.below(4),
                        repeat_percent: random.below(10),
                        delay_ms: 1 + random.below(120),
                    })
                })
                .unwrap_or_default(),
            ),
            77..82 => {
                let step = draw(|random| random.below(2 * MAX_CLOCK_STEP_MS));
                let step = step.cast_signed() - MAX_CLOCK_STEP_MS.cast_signed();
                member.clock_step_ms.store(step, Ordering::Relaxed);
            }
            82..86 => {
                if let Some((life, replica)) = member.alive() {
                    drop(spawn_in(
                        life,
                        async move { drop(replica.snapshot().await) },
                    ));
                }
            }
            86..90 => {
                if let Some((life, replica)) = member.alive() {
                    drop(spawn_in(life, async move { replica.resign().await }));
                }
            }
            90..96 => {
                let deafened = self.clone().deafen(leader.unwrap_or(place));
                let healed = spawn_in(WORLD, deafened);
                // Other blows seldom let it come to that end.
                if draw(|random| random.chance(70)) {
                    let _healed = healed.await;
                }
                return Blow::Deaf;
            }
            96..101 if member.is_up() => {
                self.fail_disk(member);
                return Blow::Disk;
            }
            101..104 => member.set_slow_disk(draw(|random| random.chance(60))),
            104..110 => {
                let paused = leader.filter(|_| draw(|random| random.chance(50)));
                if let Some(paused) = self.members.get(paused.unwrap_or(place)) {
                    self.pause(paused);
                }
                return Blow::Pause;
            }
            110.. if self.changes_members && self.has_begun() => {
                self.change_members(member);
                return Blow::Membership;
            }
            _ => {}
        }
        Blow::Other
    }

    /// No more blows: everything works again.
    pub fn heal(self: &Arc<Self>) {
        self.network.heal();
        self.network.set_weather(Weather {
            delay_ms: 5,
            ..Weather::default()
        });
        let paused: Vec<u64> = self.paused.lock().iter().copied().collect();
        for life in paused {
            self.resume(life);
        }
        for member in self.taken() {
            member.set_slow_disk(false);
            if member.data().faults().is_faulty() {
                self.crash(member);
            }
            if !member.is_up() {
                self.start(member.index);
            }
        }
    }

    /// Who leads, if a replica says so.
    pub fn leader(&self) -> Option<usize> {
        let leads = |member: &&Member| {
            member
                .replica()
                .is_some_and(|replica| replica.status().is_leader)
        };
        self.members.iter().find(leads).map(|member| member.index)
    }

    /// How long chaos goes on before the next blow.
    pub fn pause_between_blows() -> Duration {
        draw(|random| random.time_ms(20..400))
    }
}
