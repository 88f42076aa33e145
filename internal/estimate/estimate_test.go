package estimate

import (
	"testing"
	"time"
)

func TestLatency(t *testing.T) {
	tests := []struct {
		points []Point
		rows   int
		want   time.Duration
	}{
		{nil, 4, 0},
		{[]Point{{0, 1}, {1, 0}, {2, -1}}, 1, 0},
		{[]Point{{4, 1}}, 1, time.Second},
		{[]Point{{4, 1}}, 8, 2 * time.Second},
		{[]Point{{8, 5}, {1, 1}, {4, 4}}, 1, time.Second},
		{[]Point{{8, 5}, {1, 1}, {4, 4}}, 2, 2 * time.Second},
		{[]Point{{8, 5}, {1, 1}, {4, 4}}, 0, time.Second},
		{[]Point{{8, 5}, {1, 1}, {4, 4}}, 16, 7 * time.Second},
		{[]Point{{1, 2}, {2, 1}}, 4, 2 * time.Second},           // more rows never take less
		{[]Point{{1, 3}, {1, 1}, {1, 100}}, 1, 3 * time.Second}, // the median
	}
	for _, tt := range tests {
		if got := FitLatency(tt.points).At(tt.rows); got != tt.want {
			t.Errorf("%v at %d rows: %v, want %v", tt.points, tt.rows, got, tt.want)
		}
	}
}
