package main

import (
	"bytes"
	"context"
	"fmt"
	"image/color"
	"math"
	"time"

	xfont "golang.org/x/image/font"
	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// The grid of a dashboard: 24 columns, in points; head is above it.
const (
	column = 42 * vg.Length(1)
	row    = 27 * vg.Length(1)
	gap    = 4 * vg.Length(1)
	head   = 34 * vg.Length(1)
)

// draw evaluates all panels and draws them. It also names the queries that returned nothing.
func (b board) draw(ctx context.Context, r *record) (svg []byte, nothing []empty, err error) {
	panels, nothing, err := b.evaluate(ctx, r)
	if err != nil {
		return nil, nil, err
	}
	var rows float64
	for _, p := range panels {
		rows = max(rows, p.GridPos.Y+p.GridPos.H)
	}
	width, height := 24*column+2*gap, head+vg.Length(rows)*row+2*gap
	canvas := vgsvg.New(width, height)
	page := draw.New(canvas)
	fill(page, page.Rectangle, color.Gray{0xf2})
	title := fmt.Sprintf("%s: %s of one node, each query evaluated by Prometheus's engine", b.Title,
		r.end.Sub(r.start).Round(time.Second))
	page.FillText(style(13, true), vg.Point{X: 12, Y: height - 22}, title)
	for _, p := range panels {
		g := p.GridPos
		area := vg.Rectangle{
			Min: vg.Point{X: gap + vg.Length(g.X)*column, Y: height - head - vg.Length(g.Y+g.H)*row},
			Max: vg.Point{X: gap + vg.Length(g.X+g.W)*column, Y: height - head - vg.Length(g.Y)*row},
		}
		area.Min, area.Max = area.Min.Add(vg.Point{X: gap, Y: gap}), area.Max.Sub(vg.Point{X: gap, Y: gap})
		if err := p.draw(draw.Canvas{Canvas: canvas, Rectangle: area}, r); err != nil {
			return nil, nil, fmt.Errorf("panel %q: %w", p.Title, err)
		}
	}
	var buf bytes.Buffer
	if _, err := canvas.WriteTo(&buf); err != nil {
		return nil, nil, err
	}
	return bytes.ReplaceAll(buf.Bytes(), []byte("font-family:Liberation Sans;"),
		[]byte("font-family:'Liberation Sans',Arial,Helvetica,sans-serif;")), nothing, nil
}

func (p evaluated) draw(c draw.Canvas, r *record) error {
	if p.Type == "row" {
		c.FillText(style(11, true), vg.Point{X: c.Min.X + 4, Y: c.Min.Y + 4}, p.Title)
		return nil
	}
	fill(c, c.Rectangle, color.White)
	title := style(9, true)
	if p.Type == "stat" {
		return p.stat(c, title)
	}
	c.FillText(title, vg.Point{X: c.Min.X + 8, Y: c.Max.Y - 14}, p.Title)
	if len(p.lines) == 0 {
		c.FillText(style(9, false), vg.Point{X: c.Min.X + 8, Y: c.Center().Y}, "No data")
		return nil
	}
	below, err := p.legends(c)
	if err != nil {
		return err
	}
	return p.plot(draw.Crop(c, 6, -10, below+4, -20), r)
}

// stat is a panel with one figure.
func (p evaluated) stat(c draw.Canvas, title text.Style) error {
	value, shown := "No data", style(20, true)
	if len(p.lines) > 0 {
		v := p.lines[0].last()
		var err error
		if value, err = format(p.FieldConfig.Defaults.Unit, v); err != nil {
			return err
		}
		shade := p.threshold(v)
		if p.Options.ColorMode == "background" {
			fill(c, c.Rectangle, shade)
			shown.Color, title.Color = color.White, color.White
		} else {
			shown.Color = shade
		}
	}
	c.FillText(title, vg.Point{X: c.Min.X + 8, Y: c.Max.Y - 14}, p.Title)
	shown.XAlign, shown.YAlign = text.XCenter, text.YCenter
	c.FillText(shown, vg.Point{X: c.Center().X, Y: c.Center().Y - 6}, value)
	return nil
}

// threshold is the colour of the last step that v has reached.
func (p evaluated) threshold(v float64) color.Color {
	name := "green"
	for _, s := range p.FieldConfig.Defaults.Thresholds.Steps {
		if s.Value == nil || v >= *s.Value {
			name = s.Color
		}
	}
	switch name {
	case "red":
		return color.RGBA{0xc4, 0x2d, 0x3f, 0xff}
	case "orange", "yellow":
		return color.RGBA{0xd9, 0x82, 0x1e, 0xff}
	default:
		return color.RGBA{0x3a, 0x86, 0x4c, 0xff}
	}
}

// legends writes each line's name and last value, and returns how high that is.
func (p evaluated) legends(c draw.Canvas) (vg.Length, error) {
	small := style(7.5, false)
	const line = 10
	var items []string
	var widest vg.Length
	for _, s := range p.lines {
		value, err := format(p.FieldConfig.Defaults.Unit, s.last())
		if err != nil {
			return 0, err
		}
		items = append(items, s.name+": "+value)
		widest = max(widest, small.Width(items[len(items)-1])+26)
	}
	perLine := max(1, int((c.Size().X-16)/widest))
	lines := (len(items) + perLine - 1) / perLine
	for i, item := range items {
		at := vg.Point{X: c.Min.X + 10, Y: c.Min.Y + 6}
		at = at.Add(vg.Point{X: vg.Length(i%perLine) * widest, Y: vg.Length(lines-1-i/perLine) * line})
		fill(c, vg.Rectangle{Min: at.Add(vg.Point{Y: 1}), Max: at.Add(vg.Point{X: 7, Y: 6})}, colours[i%len(colours)])
		c.FillText(small, at.Add(vg.Point{X: 10}), item)
	}
	return vg.Length(lines)*line + 6, nil
}

func (p evaluated) plot(c draw.Canvas, r *record) error {
	pl := plot.New()
	pl.BackgroundColor = color.Transparent
	grid := plotter.NewGrid()
	grid.Vertical.Color, grid.Horizontal.Color = color.Gray{0xe8}, color.Gray{0xe8}
	pl.Add(grid)
	top, right := 0.0, r.end.Sub(r.start).Seconds()
	for i, s := range p.lines {
		for _, part := range s.parts(r) {
			for _, at := range part {
				top = max(top, at.Y)
			}
			if len(part) == 1 {
				part = append(part, plotter.XY{X: part[0].X + r.interval.Seconds()/2, Y: part[0].Y})
			}
			l, err := plotter.NewLine(part)
			if err != nil {
				return err
			}
			l.Color, l.Width = colours[i%len(colours)], 1.2
			pl.Add(l)
		}
	}
	pl.X.Min, pl.X.Max, pl.Y.Min = 0, right, min(0, pl.Y.Min)
	pl.Y.Max = max(top, 1e-9) * 1.08
	var err error
	if pl.Y.Tick.Marker, err = p.ticks(top); err != nil {
		return err
	}
	var times []plot.Tick
	for s := 0.0; s <= right; s += 60 {
		times = append(times, plot.Tick{Value: s, Label: fmt.Sprintf("%d min", int(s/60))})
	}
	pl.X.Tick.Marker = plot.ConstantTicks(times)
	pl.X.Tick.Label.Font, pl.Y.Tick.Label.Font = style(7.5, false).Font, style(7.5, false).Font
	pl.X.LineStyle.Color, pl.Y.LineStyle.Color = color.Gray{0xa0}, color.Gray{0xa0}
	pl.Draw(c)
	return nil
}

// parts are the points in seconds since the start, apart where there were none in between.
func (s series) parts(r *record) (all []plotter.XYs) {
	for i, at := range s.points {
		if i == 0 || at.T-s.points[i-1].T > r.interval.Milliseconds()*3/2 {
			all = append(all, nil)
		}
		last := &all[len(all)-1]
		*last = append(*last, plotter.XY{X: time.UnixMilli(at.T).Sub(r.start).Seconds(), Y: at.F})
	}
	return all
}

// ticks are about four round values from 0 to top, in the panel's unit.
func (p evaluated) ticks(top float64) (plot.ConstantTicks, error) {
	if top <= 0 {
		top = 1
	}
	base := 10.0
	if p.FieldConfig.Defaults.Unit == "bytes" {
		base = 2
	}
	step := math.Pow(base, math.Floor(math.Log(top)/math.Log(base)))
	for _, f := range []float64{0.2, 0.25, 0.5, 1} {
		if top/(step*f) <= 5 {
			step *= f
			break
		}
	}
	var list plot.ConstantTicks
	for v := 0.0; v <= top*1.001; v += step {
		label, err := format(p.FieldConfig.Defaults.Unit, v)
		if err != nil {
			return nil, err
		}
		list = append(list, plot.Tick{Value: v, Label: label})
	}
	return list, nil
}

func fill(c draw.Canvas, r vg.Rectangle, with color.Color) {
	c.SetColor(with)
	c.Fill(r.Path())
}

func style(size float64, bold bool) text.Style {
	f := font.From(plot.DefaultFont, vg.Points(size))
	f.Variant = "Sans"
	if bold {
		f.Weight = xfont.WeightBold
	}
	return text.Style{Color: color.Gray{0x20}, Font: f, Handler: plot.DefaultTextHandler}
}

// colours of lines, in order: those of Grafana's classic palette have the same hues.
var colours = []color.Color{
	color.RGBA{0x2f, 0x8f, 0x4e, 0xff}, color.RGBA{0xd9, 0x9a, 0x1c, 0xff}, color.RGBA{0x3b, 0x7d, 0xc4, 0xff},
	color.RGBA{0xd4, 0x5b, 0x1f, 0xff}, color.RGBA{0xc4, 0x2d, 0x3f, 0xff}, color.RGBA{0x5a, 0x4f, 0xa8, 0xff},
	color.RGBA{0x8a, 0x3f, 0x92, 0xff}, color.RGBA{0x4a, 0x9a, 0xa8, 0xff}, color.RGBA{0x7a, 0x7a, 0x2a, 0xff},
	color.RGBA{0x90, 0x60, 0x40, 0xff},
}
