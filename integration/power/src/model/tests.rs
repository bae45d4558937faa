use super::*;

fn append(first: u64, last: u64, term: u64) -> Op {
    Op::Append(Run { first, last, term })
}

fn found(runs: &[(u64, u64, u64)]) -> Message {
    let entries: Vec<Run> = runs
        .iter()
        .map(|&(first, last, term)| Run { first, last, term })
        .collect();
    Message::Found(Box::new(Found {
        last: entries.last().map(|run| Place {
            term: run.term,
            index: run.last,
        }),
        entries,
        ..Found::default()
    }))
}

fn after(messages: &[Message]) -> Model {
    let mut model = Model::default();
    for message in messages {
        model.take(message).unwrap();
    }
    model
}

#[test]
fn some_beginning_of_what_was_under_way_may_be_there_and_nothing_acknowledged_may_be_missing() {
    let lived = || {
        after(&[
            found(&[]),
            Message::Begin(append(0, 3, 1)),
            Message::Done,
            Message::Begin(append(4, 6, 1)),
            Message::Begin(append(7, 9, 2)),
        ])
    };
    for last in 3..=6 {
        lived().take(&found(&[(0, last, 1)])).unwrap();
    }
    lived().take(&found(&[(0, 6, 1), (7, 8, 2)])).unwrap();
    assert!(lived().take(&found(&[(0, 2, 1)])).is_err());
    assert!(lived().take(&found(&[(0, 5, 1), (7, 7, 2)])).is_err());
    assert!(lived().take(&found(&[(0, 10, 1)])).is_err());
}

#[test]
fn a_second_vote_in_a_term_is_found() {
    let vote = |term, candidate| Message::Begin(Op::Vote(Ballot { term, candidate }));
    let mut model = after(&[vote(1, 7), Message::Done, vote(1, 7), Message::Done]);
    model.take(&vote(1, 8)).unwrap();
    assert!(model.take(&Message::Done).unwrap_err().contains("twice"));
}

#[test]
fn marks_and_snapshots_never_go_back() {
    let place = Place { term: 1, index: 2 };
    let lived = || {
        after(&[
            found(&[]),
            Message::Begin(append(0, 3, 1)),
            Message::Done,
            Message::Committed(place),
            Message::Begin(Op::Snapshot(place)),
            Message::Done,
            Message::Begin(append(4, 4, 1)),
        ])
    };
    let with = |committed, snapshot| {
        let Message::Found(mut found) = found(&[(0, 3, 1)]) else {
            unreachable!()
        };
        (found.committed, found.snapshot) = (committed, snapshot);
        Message::Found(found)
    };
    // The mark was not durable yet, the snapshot was.
    lived().take(&with(None, Some(place))).unwrap();
    lived().take(&with(Some(place), Some(place))).unwrap();
    assert!(lived().take(&with(Some(place), None)).is_err());
    let mut later = lived();
    later.take(&Message::Done).unwrap();
    assert!(later.take(&with(None, Some(place))).is_err());
}
