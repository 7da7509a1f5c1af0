package org.pytorch.serve.http;

import io.netty.buffer.Unpooled;
import io.netty.channel.ChannelFuture;
import io.netty.channel.ChannelFutureListener;
import io.netty.channel.ChannelHandlerContext;
import io.netty.handler.codec.http.DefaultFullHttpResponse;
import io.netty.handler.codec.http.FullHttpMessage;
import io.netty.handler.codec.http.FullHttpResponse;
import io.netty.handler.codec.http.HttpHeaderNames;
import io.netty.handler.codec.http.HttpHeaderValues;
import io.netty.handler.codec.http.HttpMessage;
import io.netty.handler.codec.http.HttpObjectAggregator;
import io.netty.handler.codec.http.HttpResponseStatus;
import io.netty.handler.codec.http.HttpUtil;
import io.netty.handler.codec.http.HttpVersion;
import java.nio.charset.StandardCharsets;
import java.util.Locale;
import java.util.UUID;

/** Puts a request's body together. One that is too large gets the server's own error, where netty's 413 has no body. */
class BodyLimit extends HttpObjectAggregator {
    private static final String ERROR =
            "{\"error\":{\"code\":\"request_too_large\","
                    + "\"message\":\"the request is too large; at most %,d bytes are allowed\"},\"request_id\":\"%s\"}";

    private final long told;

    /** limit: in bytes; told: the lower one that clients are told, and that is checked by the service. */
    BodyLimit(int limit, long told) {
        super(limit);
        this.told = told;
    }

    @Override
    protected void handleOversizedMessage(ChannelHandlerContext context, HttpMessage request) {
        byte[] error = String.format(Locale.ROOT, ERROR, told, UUID.randomUUID()).getBytes(StandardCharsets.UTF_8);
        FullHttpResponse answer =
                new DefaultFullHttpResponse(
                        HttpVersion.HTTP_1_1, HttpResponseStatus.REQUEST_ENTITY_TOO_LARGE, Unpooled.wrappedBuffer(error));
        answer.headers().set(HttpHeaderNames.CONTENT_TYPE, HttpHeaderValues.APPLICATION_JSON);
        HttpUtil.setContentLength(answer, error.length);
        // What its length tells is too large is refused before its body, which is then read and dropped, so that a client
        // that sends first and reads later gets to the answer. A body that grows too large has no such end.
        boolean goesOn = !(request instanceof FullHttpMessage) && HttpUtil.isKeepAlive(request);
        HttpUtil.setKeepAlive(answer, goesOn);
        ChannelFuture sent = context.writeAndFlush(answer);
        if (!goesOn) {
            sent.addListener(ChannelFutureListener.CLOSE);
        }
    }
}
