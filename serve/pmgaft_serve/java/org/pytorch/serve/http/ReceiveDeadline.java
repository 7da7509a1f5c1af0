package org.pytorch.serve.http;

import io.netty.channel.ChannelHandlerContext;
import io.netty.channel.ChannelInboundHandlerAdapter;
import io.netty.handler.codec.http.HttpRequest;
import io.netty.handler.codec.http.HttpResponseStatus;
import io.netty.handler.codec.http.LastHttpContent;
import io.netty.util.concurrent.ScheduledFuture;
import java.util.concurrent.TimeUnit;
import org.pytorch.serve.util.NettyUtils;

/**
 * Ends a connection whose request is not whole in time. TorchServe waits for ever, so that a few clients that send a large
 * request nearly to its end and stop there could keep all the memory there is for requests.
 */
class ReceiveDeadline extends ChannelInboundHandlerAdapter {
    private static final long SECONDS = Long.getLong("pmgaft.receive_seconds", 60);

    private ScheduledFuture<?> deadline;

    /** Sees a request's head, then its body piece by piece: before they are put together. */
    @Override
    public void channelRead(ChannelHandlerContext context, Object piece) {
        if (piece instanceof HttpRequest) {
            start(context);
        }
        if (piece instanceof LastHttpContent) {
            cancel();
        }
        context.fireChannelRead(piece);
    }

    @Override
    public void channelInactive(ChannelHandlerContext context) {
        cancel();
        context.fireChannelInactive();
    }

    private void start(ChannelHandlerContext context) {
        deadline = context.executor().schedule(() -> end(context), SECONDS, TimeUnit.SECONDS);
    }

    private void end(ChannelHandlerContext context) {
        if (!context.channel().config().isAutoRead()) { // it is we who do not read: see OneAtATime
            start(context);
            return;
        }
        String message = "The request was not whole within " + SECONDS + " seconds.";
        NettyUtils.sendError(context, HttpResponseStatus.REQUEST_TIMEOUT, new RequestTimeoutException(message));
    }

    private void cancel() {
        if (deadline != null) {
            deadline.cancel(false);
            deadline = null;
        }
    }
}
