package main

import (
	"fmt"
	"io"
	"time"
)

// progress prints what is being done and how long it has taken so far.
type progress struct {
	w     io.Writer
	start time.Time
}

func newProgress(w io.Writer) *progress { return &progress{w: w, start: time.Now()} }

func (p *progress) say(text string) {
	fmt.Fprintf(p.w, "[%6.1f s] %s\n", time.Since(p.start).Seconds(), text)
}

func (p *progress) sayf(format string, args ...any) { p.say(fmt.Sprintf(format, args...)) }
