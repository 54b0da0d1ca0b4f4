// Package tig stands in for a package of nerdctl's test framework, which the Go module proxy does not have. nerdctl's
// program links one of its test helpers, which names this type and never runs.
package tig

// T is what that helper asks of a test.
type T interface {
	Log(args ...any)
	FailNow()
}
