//! Bytes of the fuzzer as choices: few different keys, numbers and lengths, so that what is made of them meets.

use bytes::Bytes;

/// What is left of an input. Past its end everything is 0.
pub(crate) struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    /// One of `0..count`.
    pub(crate) fn choice(&mut self, count: u8) -> u8 {
        self.byte() % count
    }

    pub(crate) fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    /// Mostly small, now and then at the edges.
    pub(crate) fn number(&mut self) -> i64 {
        match self.byte() {
            255 => i64::MAX,
            254 => i64::MIN,
            253 => -1,
            small => i64::from(small),
        }
    }

    /// A piece with its length before it, two bytes.
    pub(crate) fn piece(&mut self) -> &'a [u8] {
        let length = u16::from_le_bytes([self.byte(), self.byte()]);
        let (piece, rest) = self.0.split_at(self.0.len().min(usize::from(length)));
        self.0 = rest;
        piece
    }

    pub(crate) fn rest(self) -> &'a [u8] {
        self.0
    }

    /// One of few keys, with common beginnings.
    pub(crate) fn key(&mut self) -> Bytes {
        const KEYS: [&[u8]; 10] = [
            b"a", b"b", b"c", b"aa", b"ab", b"b\0", b"\xff", b"\0", b"a/1", b"",
        ];
        Bytes::from_static(KEYS[usize::from(self.choice(10))])
    }

    /// A key and the end of a range.
    pub(crate) fn range(&mut self) -> (Bytes, Bytes) {
        let key = self.key();
        let end = match self.choice(4) {
            0 | 1 => Bytes::new(),
            2 => Bytes::from_static(b"\0"),
            _ => self.key(),
        };
        (key, end)
    }

    pub(crate) fn value(&mut self) -> Bytes {
        let length = usize::from(self.choice(4));
        (0..length).map(|_| b'0' + self.choice(3)).collect()
    }
}

/// Pieces as [`Input::piece`] reads them.
pub(crate) fn pieces<T: AsRef<[u8]>>(pieces: impl IntoIterator<Item = T>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for piece in pieces {
        let piece = piece.as_ref();
        // Seeds are short.
        let length = u16::try_from(piece.len()).unwrap_or(u16::MAX);
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(&piece[..usize::from(length)]);
    }
    bytes
}
