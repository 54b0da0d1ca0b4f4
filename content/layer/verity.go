package layer

// Verity reports whether packs get fs-verity.
func (s *Store) Verity() bool { return s.opts.Verity }
