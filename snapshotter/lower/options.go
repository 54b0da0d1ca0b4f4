package lower

import "strings"

// Stack says what an overlay is made of.
type Stack struct {
	// Lower are the directories below, the topmost first; Objects is a data-only layer below them, "" for none.
	Lower   []string
	Objects string
	// Upper and Work are there when it can be written to.
	Upper, Work string
	// ReadOnly asks for "ro".
	ReadOnly bool
}

// Overlay returns the options of an overlay mount. It alone says what they look like.
func (k Kernel) Overlay(s Stack) []string {
	options := append([]string(nil), k.Options...)
	if s.Upper != "" {
		options = append(options, "workdir="+s.Work, "upperdir="+s.Upper)
	}
	if s.ReadOnly {
		options = append(options, "ro")
	}
	below := "lowerdir=" + strings.Join(s.Lower, ":")
	if s.Objects != "" {
		below += "::" + s.Objects
	}
	return append(options, below)
}
