package report

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// corpusPrefix begins the names of the scenarios over kinds of images that nobody chose for dedup.
const corpusPrefix = "corpus-"

// images of a corpus, in the order in which a node gets them; each metric begins with one of these, or with "all".
var corpusImages = []string{"first image", "rebuild", "minor upgrade", "base change"}

// only keeps the results of corpora, or the others.
func (r Report) only(corpora bool) Report {
	r.Results = slices.DeleteFunc(slices.Clone(r.Results), func(x Result) bool {
		return strings.HasPrefix(x.Scenario, corpusPrefix) != corpora
	})
	return r
}

// corporaMarkdown is one table for what all images of each corpus cost, and one for each image.
func (r Report) corporaMarkdown(plots string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n\n![corpora](%s/corpora.svg)\n", strings.Join(wrap(r.Caption(), 118), "\n"), plots)
	b.WriteString("\nAll four images of each corpus together:\n\n")
	for _, s := range r.scenarios() {
		fmt.Fprintf(&b, "- **%s**: %s\n", strings.TrimPrefix(s, corpusPrefix), Describe(s))
	}
	b.WriteString("\n")
	var rows [][]string
	for _, m := range []struct{ name, metric string }{
		{"disk", "all: disk"}, {"inodes", "all: inodes"}, {"pulls", "all: pull"}, {"page cache", "page cache"},
		{"page cache, at the last read", "page cache, at the last read"},
		{"reading all", "reading all"}, {"disk, with the content store", "all: disk, with the content store"},
	} {
		for _, s := range r.scenarios() {
			if row := r.corpusRow(s, m.metric); row != nil {
				rows = append(rows, append([]string{m.name, strings.TrimPrefix(s, corpusPrefix)}, row...))
			}
		}
	}
	writeTable(&b, append([]string{"", "corpus"}, r.corpusHead()...), rows)
	for _, m := range []struct{ title, metric string }{
		{"Disk that each image adds", "disk added"}, {"Inodes that each image adds", "inodes added"},
		{"Pull of each image", "pull"}, {"Start of each image, with nothing cached", "start, cold"},
	} {
		rows = nil
		for _, s := range r.scenarios() {
			for _, image := range corpusImages {
				if row := r.corpusRow(s, image+": "+m.metric); row != nil {
					rows = append(rows, append([]string{strings.TrimPrefix(s, corpusPrefix), image}, row...))
				}
			}
		}
		fmt.Fprintf(&b, "\n### %s\n\n", m.title)
		writeTable(&b, append([]string{"corpus", "image"}, r.corpusHead()...), rows)
	}
	return b.String()
}

// corporaSummary is a table of dedup ratios for the README, without columns that nothing was measured for.
func (r Report) corporaSummary(string) string {
	scenarios := r.scenarios()
	head, rows := []string{""}, make([][]string, len(scenarios))
	for i, s := range scenarios {
		rows[i] = []string{Describe(s)}
	}
	for _, c := range []struct{ name, metric string }{
		{"disk", "all: disk"}, {"node's disk", "all: disk, with the content store"}, {"page cache", "page cache"},
	} {
		for _, by := range []string{r.Baseline, "erofs"} {
			cells, measured := make([]string, len(scenarios)), false
			for i, s := range scenarios {
				cells[i] = r.times(s, c.metric, by)
				measured = measured || cells[i] != "-"
			}
			if !measured {
				continue
			}
			head = append(head, c.name+", "+by)
			for i := range rows {
				rows[i] = append(rows[i], cells[i])
			}
		}
	}
	var b strings.Builder
	writeTable(&b, head, rows)
	return b.String()
}

// times says how many times as much another one takes as dedup.
func (r Report) times(scenario, metric, by string) string {
	a, inA := r.find(scenario, judged, metric)
	b, inB := r.find(scenario, by, metric)
	if !inA || !inB || a.Median <= 0 {
		return "-"
	}
	return number(b.Median/a.Median) + "x"
}

func (r Report) corpusHead() []string {
	return []string{"overlayfs", "erofs", "dedup", "dedup/overlayfs", "dedup/erofs",
		"dedup saves, by overlayfs; by erofs"}
}

// corpusRow is one metric of one corpus; nil where dedup has none.
func (r Report) corpusRow(scenario, metric string) []string {
	if _, ok := r.find(scenario, judged, metric); !ok {
		return nil
	}
	var row []string
	for _, s := range []string{"overlayfs", "erofs", judged} {
		cell := "-"
		if x, ok := r.find(scenario, s, metric); ok {
			cell = Format(x)
		}
		row = append(row, cell)
	}
	return append(row, r.ratio(scenario, metric, judged, "overlayfs"), r.ratio(scenario, metric, judged, "erofs"),
		r.saving(scenario, metric, "overlayfs")+"; "+r.saving(scenario, metric, "erofs"))
}

// saving says in words what dedup saves: less than 2 % is nothing.
func (r Report) saving(scenario, metric, by string) string {
	a, inA := r.find(scenario, judged, metric)
	b, inB := r.find(scenario, by, metric)
	if !inA || !inB || b.Median <= 0 {
		return "-"
	}
	saved := min(0.999, 1-a.Median/b.Median)
	switch {
	case math.Abs(saved) < 0.02:
		return "nothing"
	case saved > 0.99: // rounded down: there is no saving of all
		return fmt.Sprintf("%.1f %%", math.Floor(saved*1000)/10)
	case saved < 0:
		return fmt.Sprintf("nothing: %.0f %% more", -100*saved)
	}
	return fmt.Sprintf("%.0f %%", 100*saved)
}

func writeTable(b *strings.Builder, head []string, rows [][]string) {
	fmt.Fprintf(b, "| %s |\n|%s\n", strings.Join(head, " | "), strings.Repeat(" --- |", len(head)))
	for _, row := range rows {
		fmt.Fprintf(b, "| %s |\n", strings.Join(row, " | "))
	}
}

// corporaFigure has a panel for each corpus: the disk that each of its images adds.
func (r Report) corporaFigure() ([]byte, error) {
	scenarios := r.scenarios()
	rows := (len(scenarios) + perRow - 1) / perRow
	width, height := perRow*panelWidth, headHeight+vg.Length(rows)*panelHeight+footHeight
	svg := vgsvg.New(width, height)
	r.frame(draw.New(svg), "Disk that each image adds to the node, in MB; × is dedup divided by overlayfs")
	for i, s := range scenarios {
		p, err := r.corpusPanel(s)
		if err != nil {
			return nil, fmt.Errorf("plot %s: %w", s, err)
		}
		p.Legend.Top, p.Legend.TextStyle = true, style(8, false)
		x, y := vg.Length(i%perRow)*panelWidth, height-headHeight-vg.Length(i/perRow+1)*panelHeight
		area := draw.Canvas{Canvas: svg, Rectangle: vg.Rectangle{
			Min: vg.Point{X: x, Y: y}, Max: vg.Point{X: x + panelWidth, Y: y + panelHeight},
		}}
		p.Draw(draw.Crop(area, 8, -8, 8, -8))
	}
	return encode(svg)
}

func (r Report) corpusPanel(scenario string) (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text = strings.TrimPrefix(scenario, corpusPrefix)
	p.Title.TextStyle = style(10, true)
	p.Title.TextStyle.XAlign, p.Title.TextStyle.YAlign = text.XCenter, text.YTop
	subjects := r.subjects(scenario)
	const width = 12
	var largest float64
	for n, s := range subjects {
		values := make(plotter.Values, len(corpusImages))
		for i, image := range corpusImages {
			x, _ := r.find(scenario, s, image+": disk added")
			values[i] = max(0, x.Median/1e6)
			largest = max(largest, values[i])
		}
		bars, err := plotter.NewBarChart(values, width)
		if err != nil {
			return nil, err
		}
		bars.Offset = vg.Length(float64(n)-float64(len(subjects)-1)/2) * width
		bars.Color, bars.LineStyle.Width = r.colour(s), 0
		p.Add(bars)
		p.Legend.Add(s, bars)
	}
	for i, image := range corpusImages {
		ratio := r.ratio(scenario, image+": disk added", judged, r.Baseline)
		if ratio == "-" {
			continue
		}
		var top float64
		for _, s := range subjects {
			y, _ := r.find(scenario, s, image+": disk added")
			top = max(top, y.Median/1e6)
		}
		if err := addLabel(p, float64(i), top, "× "+ratio); err != nil {
			return nil, err
		}
	}
	p.NominalX("first image", "rebuild", "upgrade", "base change")
	p.X.Tick.Label.Font, p.Y.Tick.Label.Font = style(7, false).Font, style(8, false).Font
	p.X.Min, p.X.Max = -0.6, float64(len(corpusImages))-0.4
	p.Y.Min, p.Y.Max = 0, max(largest, 1e-9)*1.45 // room for labels and the legend
	p.Y.Tick.Marker = plot.ConstantTicks(niceTicks(largest))
	return p, nil
}
