//! Places that many want: so many in all, and so many for one holder, so that none takes them from the others.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

/// Places; clones share them.
#[derive(Debug, Clone)]
pub struct Places {
    most: usize,
    most_of_one: usize,
    taken: Arc<Mutex<Taken>>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_holder: BTreeMap<String, usize>,
}

/// One place, free again when it is dropped.
#[derive(Debug)]
pub struct Place {
    taken: Arc<Mutex<Taken>>,
    holder: Option<String>,
}

/// Why there is no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// All are taken.
    All(usize),
    /// This holder has as many as one may have.
    OfOne(usize),
}

impl Places {
    /// `most` in all, `most_of_one` for each holder with a name.
    #[must_use]
    pub fn new(most: usize, most_of_one: usize) -> Self {
        Self {
            most,
            most_of_one,
            taken: Arc::default(),
        }
    }

    /// Takes one for `holder`; `None` may take them all.
    ///
    /// # Errors
    /// There is none.
    pub fn take(&self, holder: Option<String>) -> Result<Place, Full> {
        let mut taken = self.taken.lock();
        if taken.all >= self.most {
            return Err(Full::All(self.most));
        }
        if let Some(holder) = &holder {
            let has = taken.by_holder.get(holder).copied().unwrap_or(0);
            if has >= self.most_of_one {
                return Err(Full::OfOne(self.most_of_one));
            }
            taken.by_holder.insert(holder.clone(), has + 1);
        }
        taken.all += 1;
        drop(taken);
        Ok(Place {
            taken: Arc::clone(&self.taken),
            holder,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.taken.lock();
        taken.all = taken.all.saturating_sub(1);
        let Some(holder) = self.holder.take() else {
            return;
        };
        match taken.by_holder.get_mut(&holder) {
            Some(has) if *has > 1 => *has -= 1,
            _ => {
                taken.by_holder.remove(&holder);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_leaves_places_to_the_others_and_gives_its_own_back() {
        let places = Places::new(4, 2);
        let take = |name: &str| places.take(Some(name.to_owned()));
        let first = take("a").unwrap();
        let second = take("a").unwrap();
        assert_eq!(take("a").unwrap_err(), Full::OfOne(2));
        let other = take("b").unwrap();
        let anybody = places.take(None).unwrap();
        assert_eq!(take("c").unwrap_err(), Full::All(4));
        assert_eq!(places.take(None).unwrap_err(), Full::All(4));
        drop(first);
        let again = take("a").unwrap();
        drop((second, other, anybody, again));
        let taken = places.taken.lock();
        assert_eq!((taken.all, taken.by_holder.len()), (0, 0));
    }

    #[test]
    fn who_is_not_confined_may_have_them_all() {
        let places = Places::new(3, 1);
        let held: Vec<_> = (0..3).map(|_| places.take(None).unwrap()).collect();
        assert_eq!(places.take(None).unwrap_err(), Full::All(3));
        drop(held);
    }
}
