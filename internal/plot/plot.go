// Package plot draws figures as SVG: text that a browser shows by itself,
// without scripts, the same bytes for the same figure.
package plot

import (
	"bytes"
	"fmt"
	"html"
	"math"
	"slices"
	"strconv"
)

// Figure is panels side by side under one title.
type Figure struct {
	Title, Subtitle string
	// Description tells in words what the figure shows, for those who do not
	// see it.
	Description string
	Panels      []Panel
}

// Panel is one chart of lines.
type Panel struct {
	Title string
	X, Y  Axis
	Lines []Line
	Mark  *Mark
}

// Axis is what one direction of a panel means. Y begins at 0.
type Axis struct {
	Label string // with the unit: "latency of a run (ms)"
	// Doubling gives each doubling of a value the same length.
	Doubling bool
}

// greatest bounds what is drawn.
const greatest = 1e15

// Line is values of one kind, by X. A point that is no number, or greater than
// greatest, or below 0, or at an X of 0 where that doubles, is left out.
type Line struct {
	Name   string
	Points []Point
	Dashed bool // without a sign at each point
}

// Point is one value.
type Point struct{ X, Y float64 }

// Mark points out one X.
type Mark struct {
	X    float64
	Name string
}

// The figure's measures, in pixels.
const (
	panelWidth, panelHeight = 480, 400
	titleHeight             = 60
	left, right             = 72, 20
	top, bottom             = 64, 60
	legendY                 = 44
)

// colours can be told apart by those who do not see all of them (Okabe and
// Ito's); the signs tell lines apart without any.
var colours = []string{"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"}

// SVG draws the figure as an svg element.
func (f Figure) SVG() []byte {
	var b bytes.Buffer
	width, height := max(len(f.Panels), 1)*panelWidth, titleHeight+panelHeight
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-labelledby="plot-title plot-desc" viewBox="0 0 %d %d" width="%d" height="%d" font-family="system-ui, sans-serif" font-size="13" fill="#222">`+"\n", width, height, width, height)
	fmt.Fprintf(&b, "<title id=\"plot-title\">%s</title>\n<desc id=\"plot-desc\">%s</desc>\n", text(f.Title), text(f.Description))
	fmt.Fprintf(&b, "<rect width=\"%d\" height=\"%d\" fill=\"#fff\"/>\n", width, height)
	fmt.Fprintf(&b, "<text x=\"%d\" y=\"28\" font-size=\"17\" font-weight=\"600\" text-anchor=\"middle\">%s</text>\n", width/2, text(f.Title))
	fmt.Fprintf(&b, "<text x=\"%d\" y=\"48\" text-anchor=\"middle\" fill=\"#555\">%s</text>\n", width/2, text(f.Subtitle))
	for i, p := range f.Panels {
		fmt.Fprintf(&b, "<g transform=\"translate(%d %d)\">\n", i*panelWidth, titleHeight)
		p.draw(&b)
		b.WriteString("</g>\n")
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}

// scale maps values to pixels.
type scale struct {
	low, high   float64
	from, to    float64
	logarithmic bool
}

func (s scale) at(v float64) float64 {
	low, high := s.low, s.high
	if s.logarithmic {
		v, low, high = math.Log2(v), math.Log2(low), math.Log2(high)
	}
	if high <= low {
		return (s.from + s.to) / 2
	}
	return s.from + (v-low)/(high-low)*(s.to-s.from)
}

func (p Panel) draw(b *bytes.Buffer) {
	lines := make([]Line, len(p.Lines))
	var all, xs []float64
	most := 0.0
	for i, l := range p.Lines {
		lines[i] = l
		lines[i].Points = slices.DeleteFunc(slices.Clone(l.Points), func(q Point) bool {
			return !(q.X >= 0 && q.X <= greatest && q.Y >= 0 && q.Y <= greatest) || p.X.Doubling && q.X < 1/greatest
		})
		for _, q := range lines[i].Points {
			if all, most = append(all, q.X), max(most, q.Y); !l.Dashed {
				xs = append(xs, q.X) // where something was measured
			}
		}
	}
	fmt.Fprintf(b, "<text x=\"%d\" y=\"22\" font-weight=\"600\">%s</text>\n", left, text(p.Title))
	const x0, x1, y0, y1 = left, panelWidth - right, panelHeight - bottom, top
	fmt.Fprintf(b, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">%s</text>\n", (x0+x1)/2, panelHeight-16, text(p.X.Label))
	fmt.Fprintf(b, "<text transform=\"translate(18 %d) rotate(-90)\" text-anchor=\"middle\">%s</text>\n", (y0+y1)/2, text(p.Y.Label))
	if len(all) == 0 {
		fmt.Fprintf(b, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\" fill=\"#666\">nothing was measured</text>\n", (x0+x1)/2, (y0+y1)/2)
		return
	}
	if len(xs) == 0 {
		xs = slices.Clone(all)
	}
	slices.Sort(xs)
	xs = slices.Compact(xs)
	low, high := slices.Min(all), slices.Max(all)
	steps := ticks(most)
	// Points keep clear of the frame.
	x := scale{low, high, x0 + 16, x1 - 16, p.X.Doubling}
	y := scale{0, steps[len(steps)-1], y0, y1, false}

	for _, v := range steps {
		fmt.Fprintf(b, "<path d=\"M%d %sH%d\" stroke=\"#ddd\"/>", x0, pixel(y.at(v)), x1)
		fmt.Fprintf(b, "<text x=\"%d\" y=\"%s\" dy=\"4\" text-anchor=\"end\" fill=\"#555\">%s</text>\n", x0-8, pixel(y.at(v)), number(v))
	}
	shown := math.Inf(-1)
	for _, v := range xs {
		if x.at(v)-shown < 28 {
			continue // it would lie on the one before
		}
		shown = x.at(v)
		fmt.Fprintf(b, "<path d=\"M%s %dv5\" stroke=\"#555\"/>", pixel(shown), y0)
		fmt.Fprintf(b, "<text x=\"%s\" y=\"%d\" text-anchor=\"middle\" fill=\"#555\">%s</text>\n", pixel(shown), y0+20, number(v))
	}
	fmt.Fprintf(b, "<path d=\"M%d %dV%dH%d\" fill=\"none\" stroke=\"#555\"/>\n", x0, y1, y0, x1)
	if m := p.Mark; m != nil && m.X >= low && m.X <= high {
		at, anchor, off := x.at(m.X), "start", 6
		if at > (x0+x1)/2 {
			anchor, off = "end", -6
		}
		fmt.Fprintf(b, "<path d=\"M%s %dV%d\" stroke=\"#666\" stroke-dasharray=\"2 3\"/>", pixel(at), y0, y1)
		fmt.Fprintf(b, "<text x=\"%s\" y=\"%d\" text-anchor=\"%s\" fill=\"#555\" font-size=\"12\">%s</text>\n", pixel(at+float64(off)), y1-4, anchor, text(m.Name))
	}
	legend := float64(left)
	for i, l := range lines {
		colour := colours[i%len(colours)]
		dash := ""
		if l.Dashed {
			dash = " stroke-dasharray=\"6 4\""
		}
		if len(l.Points) > 1 {
			fmt.Fprintf(b, "<path d=\"")
			for j, q := range l.Points {
				fmt.Fprintf(b, "%s%s %s", map[bool]string{true: "M", false: "L"}[j == 0], pixel(x.at(q.X)), pixel(y.at(q.Y)))
			}
			fmt.Fprintf(b, "\" fill=\"none\" stroke=\"%s\" stroke-width=\"2\"%s/>\n", colour, dash)
		}
		for _, q := range l.Points {
			if !l.Dashed {
				fmt.Fprintf(b, "<path d=\"%s\" fill=\"%s\"><title>%s: %s at %s</title></path>\n", sign(i, x.at(q.X), y.at(q.Y)), colour, text(l.Name), number(q.Y), number(q.X))
			}
		}
		fmt.Fprintf(b, "<path d=\"M%s %dh24\" stroke=\"%s\" stroke-width=\"2\"%s/>", pixel(legend), legendY-4, colour, dash)
		if !l.Dashed {
			fmt.Fprintf(b, "<path d=\"%s\" fill=\"%s\"/>", sign(i, legend+12, legendY-4), colour)
		}
		fmt.Fprintf(b, "<text x=\"%s\" y=\"%d\">%s</text>\n", pixel(legend+30), legendY, text(l.Name))
		legend += 46 + 7.5*float64(len([]rune(l.Name)))
	}
}

// sign is the path of the i-th line's sign: a circle, square, triangle or diamond.
func sign(i int, x, y float64) string {
	at := func(dx, dy float64) string { return pixel(x+dx) + " " + pixel(y+dy) }
	switch i % 4 {
	case 0:
		return "M" + at(-4, 0) + "a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z"
	case 1:
		return "M" + at(-3.5, -3.5) + "h7v7h-7z"
	case 2:
		return "M" + at(0, -5) + "L" + at(4.5, 3.5) + "L" + at(-4.5, 3.5) + "z"
	}
	return "M" + at(0, -5) + "L" + at(5, 0) + "L" + at(0, 5) + "L" + at(-5, 0) + "z"
}

// ticks gives round values from 0 to most or just above it, four to eight.
func ticks(most float64) []float64 {
	if !(most > 1/greatest) {
		return []float64{0, 1}
	}
	unit := math.Pow(10, math.Floor(math.Log10(most/5)))
	step := unit
	for _, m := range []float64{1, 2, 2.5, 5, 10} {
		if step = m * unit; most/step <= 7 {
			break
		}
	}
	n := int(math.Ceil(most/step - 1e-9))
	out := make([]float64, n+1)
	for i := range out {
		out[i] = float64(i) * step
	}
	return out
}

// pixel writes a coordinate; a tenth of a pixel is enough.
func pixel(v float64) string { return strconv.FormatFloat(math.Round(v*10)/10+0, 'f', -1, 64) }

// number writes a value with three digits, or all that it has before the point.
func number(v float64) string {
	if math.Abs(v) >= 1000 {
		return strconv.FormatFloat(math.Round(v), 'f', -1, 64)
	}
	return strconv.FormatFloat(round(v), 'f', -1, 64)
}

func round(v float64) float64 {
	if v == 0 {
		return 0
	}
	unit := math.Pow(10, math.Floor(math.Log10(math.Abs(v)))-2)
	return math.Round(v/unit) * unit
}

// text is s as it may stand between tags. Control characters, which XML
// forbids, are replaced.
func text(s string) string {
	runes := []rune(s)
	for i, r := range runes {
		if r < ' ' || r == '\ufffe' || r == '\uffff' {
			runes[i] = '\ufffd'
		}
	}
	return html.EscapeString(string(runes))
}
