package report

import (
	"fmt"
	"image/color"
	"math"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// ratios draws every target as a line of its own, on a logarithmic axis: the ratio with its range, and
// a mark where the target is.
func (r Report) ratios() ([]byte, error) {
	list := r.targets()
	width, height := 8.5*vg.Inch, headHeight+footHeight+vg.Length(len(list))*16+60
	svg := vgsvg.New(width, height)
	page := draw.New(svg)
	r.frame(page, "dedup divided by others, smaller is better; | is the target")
	p := plot.New()
	p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, plot.ConstantTicks(powers())
	p.X.Min, p.X.Max = 0.001, 3
	p.X.Tick.Label.Font = style(8, false).Font
	p.Y.Min, p.Y.Max = -0.7, float64(len(list))-0.3
	p.Y.LineStyle.Width = 0
	grid := plotter.NewGrid()
	grid.Horizontal.Width = 0
	grid.Vertical.Color = color.Gray{0xdd}
	p.Add(grid)
	var ticks []plot.Tick
	for i, t := range list {
		y := float64(len(list) - 1 - i)
		ticks = append(ticks, plot.Tick{Value: y, Label: t.title() + " / " + t.reference})
		if err := addRatio(p, y, t, p.X.Min, r.colour(t.reference)); err != nil {
			return nil, err
		}
	}
	p.Y.Tick.Marker = plot.ConstantTicks(ticks)
	p.Y.Tick.Label.Font, p.Y.Tick.Length = style(8, false).Font, 0
	area := draw.Canvas{Canvas: svg, Rectangle: vg.Rectangle{
		Min: vg.Point{X: 0, Y: footHeight}, Max: vg.Point{X: width, Y: height - headHeight},
	}}
	p.Draw(draw.Crop(area, 10, -16, 4, -4))
	return encode(svg)
}

func powers() []plot.Tick {
	var ticks []plot.Tick
	for _, v := range []float64{0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3} {
		ticks = append(ticks, plot.Tick{Value: v, Label: fmt.Sprintf("%g", v)})
	}
	return ticks
}

func addRatio(p *plot.Plot, y float64, t outcome, left float64, c color.Color) error {
	at := func(v float64) float64 { return min(max(v, left), 3) }
	line := func(width vg.Length, c color.Color, points ...plotter.XY) error {
		l, err := plotter.NewLine(plotter.XYs(points))
		if err != nil {
			return err
		}
		l.LineStyle.Width, l.LineStyle.Color = width, c
		p.Add(l)
		return nil
	}
	missed := color.RGBA{0xc0, 0x39, 0x2b, 0xff}
	mark := color.Color(color.Black)
	if t.verdict() == "missed" {
		mark = missed
	}
	if err := line(8, c, plotter.XY{X: left, Y: y}, plotter.XY{X: at(t.ratio), Y: y}); err != nil {
		return err
	}
	if err := line(1, color.Black, plotter.XY{X: at(t.min), Y: y}, plotter.XY{X: at(t.max), Y: y}); err != nil {
		return err
	}
	if err := line(2, mark, plotter.XY{X: at(t.want), Y: y - 0.42}, plotter.XY{X: at(t.want), Y: y + 0.42}); err != nil {
		return err
	}
	label, err := plotter.NewLabels(plotter.XYLabels{
		XYs: plotter.XYs{{X: math.Max(at(t.max), at(t.want)), Y: y}}, Labels: []string{fmt.Sprintf("%.3g", t.ratio)},
	})
	if err != nil {
		return err
	}
	label.TextStyle[0] = style(8, false)
	label.TextStyle[0].YAlign = text.YCenter
	label.TextStyle[0].Color = mark
	label.Offset = vg.Point{X: 5}
	p.Add(label)
	return nil
}
