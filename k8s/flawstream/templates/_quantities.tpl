{{/* Kubernetes quantities as numbers. */}}

{{/* The number of a quantity such as 500m, 2 or 1.5Gi, as text. */}}
{{- define "flawstream.number" -}}
{{- $text := toString . -}}
{{- $unit := regexFind "[a-zA-Z]*$" $text -}}
{{- $factors := dict "" 1.0 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 "Pi" 1125899906842624.0 -}}
{{- mulf (float64 (trimSuffix $unit $text)) (get $factors $unit) -}}
{{- end -}}
