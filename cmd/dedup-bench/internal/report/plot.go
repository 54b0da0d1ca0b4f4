package report

import (
	"bytes"
	"fmt"
	"image/color"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	xfont "golang.org/x/image/font"
	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// Sizes of a figure: panels stand in rows of at most perRow.
const (
	perRow      = 3
	panelWidth  = 3.3 * vg.Inch
	panelHeight = 2.45 * vg.Inch
	headHeight  = 0.45 * vg.Inch
	footHeight  = 0.4 * vg.Inch
)

// Plots writes one SVG for each scenario, with a panel for each metric, and ratios.svg; one for all corpora.
func (r Report) Plots(dir string) error {
	if corpora := r.only(true); len(corpora.Results) > 0 {
		data, err := corpora.corporaFigure()
		if err != nil {
			return err
		}
		if err := writeFile(filepath.Join(dir, "corpora.svg"), data); err != nil {
			return err
		}
	}
	for _, scenario := range r.only(false).scenarios() {
		data, err := r.figure(scenario)
		if err != nil {
			return fmt.Errorf("plot %s: %w", scenario, err)
		}
		if err := writeFile(filepath.Join(dir, scenario+".svg"), data); err != nil {
			return err
		}
	}
	if len(r.targets()) == 0 {
		return nil
	}
	data, err := r.ratios()
	if err != nil {
		return fmt.Errorf("plot ratios: %w", err)
	}
	return writeFile(filepath.Join(dir, "ratios.svg"), data)
}

// figure draws all metrics of a scenario.
func (r Report) figure(scenario string) ([]byte, error) {
	metrics := distinct(r.of(scenario), func(x Result) string { return x.Metric })
	columns := min(perRow, len(metrics))
	rows := (len(metrics) + columns - 1) / columns
	width := max(vg.Length(columns)*panelWidth, 2*panelWidth)
	height := headHeight + vg.Length(rows)*panelHeight + footHeight
	svg := vgsvg.New(width, height)
	page := draw.New(svg)
	r.frame(page, scenario+": "+Describe(scenario))
	for i, metric := range metrics {
		p, err := r.panel(scenario, metric)
		if err != nil {
			return nil, err
		}
		x := vg.Length(i%columns) * width / vg.Length(columns)
		y := height - headHeight - vg.Length(i/columns+1)*panelHeight
		area := draw.Canvas{Canvas: svg, Rectangle: vg.Rectangle{
			Min: vg.Point{X: x, Y: y}, Max: vg.Point{X: x + width/vg.Length(columns), Y: y + panelHeight},
		}}
		p.Draw(draw.Crop(area, 8, -8, 8, -8))
	}
	return encode(svg)
}

// encode names fonts of the same widths for readers without Liberation.
func encode(svg *vgsvg.Canvas) ([]byte, error) {
	var buf bytes.Buffer
	if _, err := svg.WriteTo(&buf); err != nil {
		return nil, err
	}
	return bytes.ReplaceAll(buf.Bytes(), []byte("font-family:Liberation Sans;"),
		[]byte("font-family:'Liberation Sans',Arial,Helvetica,sans-serif;")), nil
}

// frame paints a page's ground, its head and, below, what all was measured on.
func (r Report) frame(page draw.Canvas, title string) {
	page.SetColor(color.White)
	page.Fill(page.Rectangle.Path())
	page.FillText(style(13, true), vg.Point{X: 10, Y: page.Max.Y - 22}, title)
	foot := style(8, false)
	foot.Color = color.Gray{0x60}
	lines := wrap(r.Caption(), int(page.Size().X/4.1))
	for i, line := range lines {
		page.FillText(foot, vg.Point{X: 10, Y: 8 + vg.Length(len(lines)-1-i)*10}, line)
	}
}

// wrap breaks a list at its commas.
func wrap(s string, width int) []string {
	lines := []string{""}
	for i, part := range strings.Split(s, ", ") {
		last := &lines[len(lines)-1]
		switch {
		case i == 0:
			*last = part
		case len(*last)+len(part)+2 > width:
			*last += ","
			lines = append(lines, part)
		default:
			*last += ", " + part
		}
	}
	return lines
}

func style(size float64, bold bool) text.Style {
	f := font.From(plot.DefaultFont, vg.Points(size))
	f.Variant = "Sans"
	if bold {
		f.Weight = xfont.WeightBold
	}
	return text.Style{Color: color.Black, Font: f, Handler: plot.DefaultTextHandler}
}

// panel is a bar for each subject, with its range, its figure and its ratio to the baseline.
func (r Report) panel(scenario, metric string) (*plot.Plot, error) {
	p := plot.New()
	subjects := slices.DeleteFunc(r.subjects(scenario), func(s string) bool {
		_, ok := r.find(scenario, s, metric)
		return !ok
	})
	var largest float64
	for _, s := range subjects {
		x, _ := r.find(scenario, s, metric)
		largest = max(largest, x.Max)
	}
	first, _ := r.find(scenario, subjects[0], metric)
	scale, unit := scaleOf(first.Unit, largest)
	p.Title.Text = metric
	if unit != "" {
		p.Title.Text += " [" + unit + "]"
	}
	p.Title.TextStyle = style(10, false)
	p.Title.TextStyle.XAlign, p.Title.TextStyle.YAlign = text.XCenter, text.YTop
	p.Title.Padding = vg.Points(4)
	var labels []string
	for i, s := range subjects {
		x, _ := r.find(scenario, s, metric)
		if err := addBar(p, float64(i), x, scale, r.colour(s)); err != nil {
			return nil, err
		}
		label := number(x.Median / scale)
		if ratio := r.ratio(scenario, metric, s, r.Baseline); s != r.Baseline && ratio != "-" {
			label += "\n× " + ratio
		}
		if err := addLabel(p, float64(i), x.Max/scale, label); err != nil {
			return nil, err
		}
		labels = append(labels, strings.Replace(s, "-", "\n", 1))
	}
	p.NominalX(labels...)
	p.X.Tick.Label.Font, p.Y.Tick.Label.Font = style(8, false).Font, style(8, false).Font
	p.X.Min, p.X.Max = -0.6, float64(len(subjects))-0.4
	p.Y.Min, p.Y.Max = 0, max(largest/scale, 1e-9)*1.3 // room for the labels
	p.Y.Tick.Marker = plot.ConstantTicks(niceTicks(largest / scale))
	return p, nil
}

// niceTicks are round values from 0 to about largest.
func niceTicks(largest float64) []plot.Tick {
	if largest <= 0 {
		return []plot.Tick{{Value: 0, Label: "0"}}
	}
	step := math.Pow(10, math.Floor(math.Log10(largest)))
	for _, f := range []float64{0.2, 0.25, 0.5, 1} {
		if largest/(step*f) <= 5 {
			step *= f
			break
		}
	}
	var ticks []plot.Tick
	for v := 0.0; v <= largest*1.001; v += step {
		ticks = append(ticks, plot.Tick{Value: v, Label: strconv.FormatFloat(v, 'f', -1, 32)})
	}
	return ticks
}

func addBar(p *plot.Plot, at float64, x Result, scale float64, c color.Color) error {
	bar, err := plotter.NewBarChart(plotter.Values{x.Median / scale}, vg.Points(30))
	if err != nil {
		return err
	}
	bar.XMin, bar.Color, bar.LineStyle.Width = at, c, 0
	p.Add(bar)
	if x.Min == x.Max {
		return nil
	}
	errs, err := plotter.NewYErrorBars(ranged{plotter.XYs{{X: at, Y: x.Median / scale}}, (x.Median - x.Min) / scale,
		(x.Max - x.Median) / scale})
	if err != nil {
		return err
	}
	errs.LineStyle.Width, errs.CapWidth = vg.Points(1), vg.Points(8)
	p.Add(errs)
	return nil
}

// ranged is one point with its range.
type ranged struct {
	plotter.XYs
	low, high float64
}

func (r ranged) YError(int) (float64, float64) { return r.low, r.high }

func addLabel(p *plot.Plot, x, y float64, label string) error {
	labels, err := plotter.NewLabels(plotter.XYLabels{XYs: plotter.XYs{{X: x, Y: y}}, Labels: []string{label}})
	if err != nil {
		return err
	}
	for i := range labels.TextStyle {
		labels.TextStyle[i] = style(8, false)
		labels.TextStyle[i].XAlign, labels.TextStyle[i].YAlign = text.XCenter, text.YBottom
	}
	labels.Offset = vg.Point{Y: 3}
	p.Add(labels)
	return nil
}

// colour of a subject: one hue for dedup, greys and browns for what it is compared with.
func (r Report) colour(subject string) color.Color {
	switch subject {
	case "overlayfs":
		return color.RGBA{0x8c, 0x96, 0xa3, 0xff}
	case "erofs":
		return color.RGBA{0xd9, 0x95, 0x4b, 0xff}
	case "native":
		return color.RGBA{0xb8, 0xae, 0xa0, 0xff}
	case "dedup":
		return color.RGBA{0x1f, 0x77, 0xb4, 0xff}
	case "dedup-exact":
		return color.RGBA{0x5f, 0xa3, 0xd3, 0xff}
	case "dedup-normalized":
		return color.RGBA{0x9b, 0xc8, 0xe8, 0xff}
	case "limit":
		return color.RGBA{0x6a, 0xa8, 0x6f, 0xff}
	default:
		return color.RGBA{0x9a, 0x7b, 0xb5, 0xff}
	}
}
