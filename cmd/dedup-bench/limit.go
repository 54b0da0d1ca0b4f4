package main

import (
	"os"

	"github.com/urfave/cli/v2"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedup-bench/internal/bench"
)

func limitCommand() *cli.Command {
	return &cli.Command{
		Name:  "limit",
		Usage: "measure what decompression and hashing alone take for the images of cold and rebuild",
		Description: "No pull can be faster as long as a layer has to be decompressed and hashed. Pulls both images with\n" +
			"dedup too and shows how far from the limit that is. Needs root.",
		Flags: commonFlags(),
		Action: func(c *cli.Context) error {
			p := newProgress(os.Stderr)
			opts, err := options(c, p)
			if err != nil {
				return err
			}
			opts.Scenarios = []string{"cold", "rebuild"}
			if opts.Subjects, err = bench.ParseSubjects([]string{bench.Limit, "dedup"}); err != nil {
				return err
			}
			return measure(c, p, opts)
		},
	}
}
