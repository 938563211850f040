{{/* Labels of every object: (dict "root" $ "component" NAME "extra" LABELS); the chart's own win over extra ones. */}}
{{- define "rpl.labels" -}}
{{- $labels := dict
  "app.kubernetes.io/name" "rpl"
  "app.kubernetes.io/part-of" "rpl"
  "app.kubernetes.io/component" .component
  "app.kubernetes.io/instance" .root.Release.Name
  "app.kubernetes.io/version" .root.Chart.AppVersion
  "app.kubernetes.io/managed-by" .root.Release.Service
  "helm.sh/chart" (printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_")
}}
{{- toYaml (merge $labels (.extra | default dict)) }}
{{- end }}

{{/* Name, namespace and labels of an object: (dict "root" $ "name" NAME "component" NAME "extra" LABELS). */}}
{{- define "rpl.metadata" -}}
name: {{ .name }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "rpl.labels" . | nindent 2 }}
{{- end }}

{{/* Full name of an image: (dict "root" $ "image" .Values.images.light). */}}
{{- define "rpl.image" -}}
{{- $name := printf "%s/%s" (trimSuffix "/" .root.Values.images.registry) .image.repository -}}
{{- if .image.digest -}}
{{ $name }}@{{ .image.digest }}
{{- else -}}
{{ $name }}:{{ .image.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end }}

{{/* TCP ports of a NetworkPolicy rule, from a list of numbers. */}}
{{- define "rpl.ports" -}}
{{- $ports := list }}
{{- range . }}
  {{- $ports = append $ports (dict "protocol" "TCP" "port" (int .)) }}
{{- end }}
{{- toYaml $ports }}
{{- end }}

{{/* The public internet as NetworkPolicy peers: what rpl/connections.py refuses to dial is left out; a test compares. */}}
{{- define "rpl.internet" -}}
- ipBlock:
    cidr: 0.0.0.0/0
    except:
      - 0.0.0.0/8
      - 10.0.0.0/8
      - 100.64.0.0/10
      - 127.0.0.0/8
      - 168.63.129.16/32  # one cloud's host agent, though the range is public
      - 169.254.0.0/16  # most clouds' metadata
      - 172.16.0.0/12
      - 192.0.0.0/24
      - 192.0.2.0/24
      - 192.31.196.0/24
      - 192.52.193.0/24
      - 192.88.99.0/24
      - 192.168.0.0/16
      - 192.175.48.0/24
      - 198.18.0.0/15
      - 198.51.100.0/24
      - 203.0.113.0/24
      - 224.0.0.0/4
      - 240.0.0.0/4
- ipBlock:
    cidr: 2000::/3  # all that is given out: local, mapped and NAT64 addresses lie outside
    except:
      - 2001::/23
      - 2001:db8::/32
      - 2002::/16  # holds an IPv4 address
      - 2620:4f:8000::/48
      - 3fff::/20
{{- end }}
