package layer

// Verity reports whether packs get fs-verity.
func (d *directory) Verity() bool { return d.opts.Verity }
